"""Keeps the image of a model that has been loaded and proved."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.api.engine import EngineConfig
from engine.cache.kv_tensors import KVCache
from engine.image.image_file import image_path, owner, states, write_image
from engine.image.links import Region, link
from engine.model.loader import LoadedModel
from engine.native.runner import NativeRunner

_log = logging.getLogger(__name__)
PANELS = 1
"""The segment of the panels; those of the keys and of the values of each layer follow in turn."""


def keep_image(model: LoadedModel, runner: NativeRunner, cache: KVCache, config: EngineConfig, logits: str) -> None:
    """Write the image, once the panels are in their file; ``logits`` is the digest of what ``runner`` computes.

    What cannot be kept costs the next start its speed and nothing else.
    """
    path, panels, decoder = image_path(config), model.panels, runner.decoder
    if path is None or panels is None:
        return
    regions = [Region(address, length, PANELS, offset) for address, offset, length in panels.places]
    tensors = [tensor for pair in zip(cache.keys, cache.values, strict=True) for tensor in pair]
    regions += [Region(one.data_ptr(), one.nbytes, PANELS + 1 + place) for place, one in enumerate(tensors)]
    try:
        linked = link(decoder.model, decoder.kept, regions)
        facts: dict[str, Any] = {
            "of": owner(config),
            "sources": states([*panels.sources, panels.path]),
            "library": hashlib.sha256(Path(runner.code._name).read_bytes()).hexdigest(),
            "info": asdict(runner.info),
            "shapes": model.probe.shapes,
            "windows": model.probe.windows,
            "max_context": model.max_context,
            "limit": model.limit,
            "num_embeddings": decoder.num_embeddings,
            "vector_scale": decoder.vector_scale,
            "logits": logits,
        }
        write_image(path, linked.chunks(), linked.pointers, facts)
    except (ImportError, OSError, ValueError) as error:
        _log.warning("The next start loads and proves the model again, because that cannot be kept: %s", error)

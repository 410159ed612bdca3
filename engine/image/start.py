"""Starts a model from its image: no torch, no transformers, no weights but those that are mapped."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.api.block_groups import Window
from engine.api.engine import EngineConfig, ModelInfo
from engine.api.errors import ModelRefused
from engine.cache.layout import CachePlan, KVShape, group_demands, plan_caches
from engine.cache.lazy_memory import zeroed
from engine.cache.plan_summary import log_blocks, log_context
from engine.device.cpu_count import default_threads
from engine.device.machine_memory import available_bytes, total_bytes
from engine.device.shortage import of_the_machine
from engine.image.image_file import Image, image_path, owner, read_image, states
from engine.image.links import relink
from engine.image.sample import digest_of_logits
from engine.native import library
from engine.native.errors import NotNative
from engine.native.runner import Decoder, NativeRunner
from engine.platforms import machine
from engine.scheduling.chunk_budget import most_launched

_log = logging.getLogger(__name__)
_FLOAT = np.dtype(np.float32)


def runner_of_image(config: EngineConfig, progress: Callable[[str, float], None]) -> NativeRunner | None:
    """The runner of a model that an earlier start has proved; None where this start has to do so itself.

    Raises ``ModelRefused`` if the memory does not hold a cache.
    """
    path = image_path(config)
    if path is None or not path.exists():
        return None
    try:
        image = read_image(path)
        if image is None or not _is_current(image.facts, config):
            return None
        progress("mapping weights", 0.0)
        return _runner(image, config)
    except (ImportError, LookupError, MemoryError, NotNative, OSError, TypeError, ValueError) as error:
        _log.warning("The image of the model cannot be used: %s", error)
        return None


def _is_current(facts: dict[str, Any], config: EngineConfig) -> bool:
    sources = states(Path(name) for name, *_ in facts["sources"])
    # As JSON has it: lists for tuples.
    return bool(facts["of"] == owner(config) and facts["sources"] == sources)


def _runner(image: Image, config: EngineConfig) -> NativeRunner | None:
    facts = image.facts
    code = library.load_library(Path(str(config.cache_dir)) / "native")
    if hashlib.sha256(Path(code._name).read_bytes()).hexdigest() != facts["library"]:
        return None
    shapes = [KVShape(*shape) for shape in facts["shapes"]]
    windows = [None if window is None else Window(*window) for window in facts["windows"]]
    demands = group_demands(shapes, windows, config.block_size, _FLOAT)
    try:
        plan = plan_caches(
            machine.cache_bytes(config.kv_memory, 0),
            demands,
            config.block_size,
            facts["max_context"],
            config.max_running or machine.MAX_RUNNING,
            launched=most_launched(ahead=False),
        )
    except ModelRefused as refusal:
        raise ModelRefused(f"{refusal}; {of_the_machine(available_bytes(), total_bytes())}") from None
    kept = facts["info"]
    if plan.max_context > kept["max_context"]:
        return None  # there are angles for no more positions
    log_blocks(plan, config.block_size, str(_FLOAT), demands)
    log_context(plan, facts["max_context"], facts["limit"])
    panels = np.memmap(facts["sources"][-1][0], np.uint8, "r")
    caches = [np.frombuffer(zeroed(each), np.uint8) for each in _cache_sizes(shapes, plan, config.block_size)]
    relink(image.data, image.pointers, [0, panels.ctypes.data, *(part.ctypes.data for part in caches)])
    decoder = Decoder(
        library.Model.from_buffer(image.data.data),
        kept["vocab_size"],
        facts["num_embeddings"],
        facts["vector_scale"],
        [image, panels, caches],
    )
    runner = NativeRunner(code, decoder, _info(facts, plan), config.threads or default_threads())
    if digest_of_logits(runner) != facts["logits"]:
        _log.warning("The image of the model computes other numbers than the model did; it is loaded and proved again")
        return None
    return runner


def _cache_sizes(shapes: list[KVShape], plan: CachePlan, block_size: int) -> list[int]:
    """Bytes of the keys and of the values of each layer in turn."""
    tokens = [plan.groups[shape.group].num_blocks * block_size * shape.heads for shape in shapes]
    sizes = ((count * shape.key_size, count * shape.value_size) for count, shape in zip(tokens, shapes, strict=True))
    return [math.prod((numbers, _FLOAT.itemsize)) for pair in sizes for numbers in pair]


def _info(facts: dict[str, Any], plan: CachePlan) -> ModelInfo:
    info = ModelInfo(**{**facts["info"], "eos_ids": tuple(facts["info"]["eos_ids"]), "groups": plan.groups})
    is_whole = plan.max_context == facts["max_context"]
    return replace(
        info,
        max_context=plan.max_context,
        max_running=plan.max_running,
        context_limit=facts["limit"] if is_whole else "",
    )

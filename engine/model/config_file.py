"""Reads the config.json of a model: its numbers are bounded before any library builds something from them.

transformers' configuration classes make lists from these numbers as soon as they are constructed, so the file itself
has to be checked first.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from engine.api.errors import ModelRefused
from engine.failures import refused_as, sentence

MAX_BYTES = 4 << 20

# Far beyond any model, and small enough that building all of it without memory takes seconds. A key gets the limit of
# the first pattern that it matches; for a list, its length counts.
LIMITS = (
    (re.compile(r"theta|limit"), math.inf),
    (re.compile(r"size|dim|embd|rank|width|channel|vocab|^d_"), 1 << 26),
    (re.compile(r"layer|(^|_)depths?$|stages|blocks"), 1000),
    (re.compile(r"expert|head"), 1 << 16),
    (re.compile(r"^(num|n)_(?!positions|ctx)|label"), 1 << 20),
    (re.compile(r""), 1 << 53),
)


def read_config(folder: Path) -> Any:
    """What transformers makes of ``config.json``. Raises ``ModelRefused``, naming key, value and limit.

    The file does not decide how attention is computed: transformers would fetch the code that it names from a hub.
    """
    path = folder / "config.json"
    content = _object(path)
    for key, number, shown in _numbers(content):
        limit = next(limit for pattern, limit in LIMITS if pattern.search(key.lower()))
        if abs(number) > limit:
            raise ModelRefused(f"{key} in {path} is {shown}; at most {limit} is served")
    with refused_as(f"the config.json in {folder} is not understood"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        config._attn_implementation = "eager"  # also in its sub-configurations
    if quantisation_of(config) is None and (settings := _told_beside(folder)) is not None:
        config.quantization_config = settings
    return config


def quantisation_of(config: Any) -> dict[str, Any] | None:
    """How a configuration says that its weights are quantised; None if it does not."""
    for part in (config, getattr(config, "text_config", None)):
        settings = getattr(part, "quantization_config", None)
        if settings is not None:
            return dict(settings if isinstance(settings, dict) else settings.to_dict())
    return None


def _told_beside(folder: Path) -> dict[str, Any] | None:
    """What older tools wrote of their quantisation, beside a config.json that knows nothing of it."""
    if (path := folder / "hf_quant_config.json").is_file():
        return {"quant_method": "modelopt", **_object(path).get("quantization", {})}
    if (path := folder / "quantize_config.json").is_file():
        return {"quant_method": "gptq", **_object(path)}
    return None


def _object(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ModelRefused(f"{path} has {size} bytes; at most {MAX_BYTES} are read")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelRefused(f"{path} cannot be read as JSON: {sentence(error)}") from error
    if not isinstance(content, dict):
        raise ModelRefused(f"{path} holds no JSON object")
    return content


def _numbers(content: dict[str, Any]) -> Iterator[tuple[str, float, str]]:
    """Each number of a file and the length of each list, with its key and as text. The file bounds the depth."""
    for key, value in content.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                yield from _numbers(item)
            elif isinstance(item, int | float):
                shown = f"{item:.40g}" if isinstance(item, float) else str(item)
                if isinstance(item, int) and len(shown) > 40:
                    shown = f"a number of {len(shown)} digits"
                yield key, item, shown
        if isinstance(value, list):
            yield key, len(value), f"a list of {len(value)}"

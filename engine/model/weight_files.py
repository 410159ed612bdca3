"""How much memory the weights of a prepared folder take, known before any is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from engine.api.errors import ModelRefused
from engine.device.device_memory import advice_on, all_bytes, free_bytes, size, who_holds
from engine.failures import refused_as

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def require_room(folder: Path, config: Any, num_weights: int, dtype: torch.dtype | str, device: torch.device) -> None:
    """Refuse a model of safetensors whose weights alone do not fit into what is free on the device. Loads nothing.

    ``dtype`` is that of the loaded weights, as ``loaded_dtype`` takes it.
    """
    stored = stored_dtype(folder)
    loaded = loaded_dtype(config, dtype, stored)
    what = f"the {num_weights} weights in {folder}"
    if problem := room_problem(what, num_weights, stored, loaded, device, free_bytes(device)):
        raise ModelRefused(problem)


def loaded_dtype(config: Any, dtype: torch.dtype | str, stored: torch.dtype) -> torch.dtype:
    """The type that weights are loaded in: ``dtype``, where that is "auto" that of the configuration, else of the
    files."""
    return next(kind for kind in (dtype, getattr(config, "dtype", None), stored) if isinstance(kind, torch.dtype))


def room_problem(
    what: str, num_weights: int, stored: torch.dtype, loaded: torch.dtype, device: torch.device, room: int
) -> str | None:
    """Why weights, named by ``what``, do not fit into ``room`` bytes of the device, in one sentence; None if they do.

    A CPU maps files that hold the type already: their pages need no free memory. If all of its memory is less than they
    are, it would read the disk for every token.
    """
    wanted, is_mapped = num_weights * loaded.itemsize, device.type == "cpu" and stored == loaded
    if wanted <= (all_bytes(device) if is_mapped else room):
        return None
    more = ""
    if loaded.itemsize > 2 and wanted * 2 // loaded.itemsize <= all_bytes(device):
        more = ", or halve its weights with dtype: bfloat16"
    return too_large(what, wanted, str(loaded).removeprefix("torch."), device) + more


def too_large(what: str, wanted: int, kind: str, device: torch.device) -> str:
    """What to say of weights that take ``wanted`` bytes in ``kind`` and do not fit."""
    advice = advice_on(device)
    if wanted > all_bytes(device):  # whatever else is ended there
        advice = "serve a smaller model" + (", or this one with device: cpu" if device.type == "cuda" else "")
    return f"{what} take {size(wanted)} in {kind}, which do not fit: {who_holds(device)}; {advice}"


def stored_dtype(folder: Path) -> torch.dtype:
    """The type of the first floating tensor in the first file, as transformers takes it. Raises ``ModelRefused``."""
    for path in sorted(folder.glob("*.safetensors")):
        with refused_as(f"the weights in {folder} cannot be loaded"), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a file of tensors is not a dictionary
                if found := _TYPES.get(file.get_slice(name).get_dtype()):
                    return found
    return torch.float32

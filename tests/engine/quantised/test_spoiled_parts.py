"""Each stored tensor of each published weight, spoiled in many ways: it is read or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from engine.api.errors import ModelRefused
from engine.quantised import method_of

FILES = sorted((Path(__file__).parents[2] / "data" / "quantised").glob("*.safetensors"))
Spoil = Callable[[torch.Tensor], torch.Tensor]
SPOILED: dict[str, Spoil] = {
    "a row less": lambda one: one[:-1],
    "a column less": lambda one: one[..., :-1],
    "twice the rows": lambda one: torch.cat([one, one]),
    "turned": lambda one: one.mT if one.ndim > 1 else one.flip(0),
    "end to end": lambda one: one.reshape(-1),
    "a dimension more": lambda one: one.unsqueeze(0),
    "a dimension at the end": lambda one: one.unsqueeze(-1),
    "nothing": lambda one: one.reshape(-1)[:0],
    "no columns": lambda one: one[..., :0],
    "one number": lambda one: one.reshape(-1)[0],
    "float32": lambda one: one.float(),
    "int64": lambda one: one.long(),
    "int32": lambda one: one.int(),
    "bytes": lambda one: one.to(torch.uint8),
    "bool": lambda one: one.bool(),
    "complex": lambda one: one.to(torch.complex64),
    "all ones": lambda one: one.contiguous().view(torch.uint8).fill_(255).view(one.dtype) if one.ndim else one,
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_spoiled_tensor_is_read_or_refused(path: Path) -> None:
    with safe_open(path, "pt") as stored:
        described = stored.metadata()
        method = method_of(json.loads(described["quantization_config"]))
        (names,) = method.grouped(set(stored.keys()) - {"numbers"}).values()
        parts = {role: stored.get_tensor(name) for role, name in names.items()}
    refused = 0
    for role, part in parts.items():
        for what, spoil in SPOILED.items():
            try:
                spoiled = spoil(part.clone())
            except (IndexError, RuntimeError):
                continue  # a number has no rows
            try:
                found = method.read({**parts, role: spoiled})
            except ModelRefused:
                refused += 1
            except Exception as error:
                raise AssertionError(f"{role}: {what}") from error
            else:
                assert len(found.shape) >= 2, (role, what)
    assert refused > 2 * len(parts)

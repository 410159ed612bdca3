"""The tensors of a GGUF file by the names of a transformers model, changed into what the model expects.

An architecture (``architectures.py``) names its changes as transformers does: renamings, then at most one conversion,
such as rows in another order, or two tensors in one. A conversion that only moves whole rows is done on blocks.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from engine.gguf.header import Header, Tensor
from engine.packed.schemes import SCHEMES, Blocks

_FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64}
_KIND_OF = {dtype: kind for kind, dtype in _FLOATS.items()}


class StoredWeight:
    """A weight of the model: the tensors that it is made of, by the pattern that each one matched, and what is done."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._sources: dict[str, list[Tensor]] = {}
        self._converter: Any = None

    def add(self, pattern: str, tensor: Tensor, converter: Any) -> None:
        self._sources.setdefault(pattern, []).append(tensor)
        self._converter = converter

    def blocks(self) -> Blocks | None:
        """Its blocks, if all of it is of one scheme and nothing that is done to it looks into a block."""
        kinds = {tensor.kind for tensors in self._sources.values() for tensor in tensors}
        kind = kinds.pop()
        if kinds or kind not in SCHEMES:
            return None
        operations = () if self._converter is None else self._converter.operations
        if not all(getattr(operation, "supports_packed", False) for operation in operations):
            return None
        orders = [found for step in operations if (found := getattr(step, "input_permutation", None)) is not None]
        data = self._changed({name: [mapped(each) for each in group] for name, group in self._sources.items()})
        return Blocks(data, SCHEMES[kind], orders[0] if orders else None)

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        """Its numbers, computed in float32 and rounded to ``dtype``."""
        unpacked = {name: [numbers_of(each) for each in group] for name, group in self._sources.items()}
        return self._changed(unpacked).to(dtype)

    def shape(self) -> torch.Size:
        """The shape of its numbers, found without reading any."""
        empty = {
            name: [torch.empty(each.shape, device="meta") for each in group] for name, group in self._sources.items()
        }
        return self._changed(empty).shape

    def _changed(self, found: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        if self._converter is None:
            ((tensor,),) = found.values()
            return tensor
        converter = self._converter
        ordered = {pattern: found[pattern] for pattern in converter.source_patterns if pattern in found}
        for operation in converter.operations:
            ordered = operation.convert(
                ordered,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=self.name,
                model=None,
                config=None,
                missing_keys=None,
            )
        (tensor,) = ordered.values()
        return tensor[0] if isinstance(tensor, list) else tensor


def stored_dtype(header: Header) -> torch.dtype:
    """The type that a file's weights stand for: that of its matrices, bfloat16 where they are in blocks."""
    kinds = {tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1}
    if not kinds <= _FLOATS.keys():
        return torch.bfloat16
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if _KIND_OF[dtype] in kinds), torch.float32)


def stored_weights(header: Header, changes: list[Any]) -> dict[str, StoredWeight]:
    """The weights of a model by their names there."""
    changes = deepcopy(changes)  # a renaming keeps in mind that it was used
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    weights: dict[str, StoredWeight] = {}
    for tensor in header.tensors.values():
        if tensor.name.startswith("rope_f"):
            continue  # of the rotation, which is the configuration's
        name, pattern = rename_source_key(tensor.name, renamings, converters)
        weights.setdefault(name, StoredWeight(name)).add(pattern or tensor.name, tensor, by_pattern.get(pattern))
    return weights


@cache
def _bytes_of(path: Path) -> np.ndarray:
    """A file, mapped: pages are read when they are used, and shared with other processes. Never written to."""
    return np.memmap(path, mode="c", dtype=np.uint8)


def mapped(tensor: Tensor) -> torch.Tensor:
    """The bytes of a tensor in blocks, [..., rows, bytes of a row], where the file is mapped."""
    scheme = SCHEMES[tensor.kind]
    shape = (*tensor.shape[:-1], scheme.row_bytes(tensor.shape[-1]))
    size = int(np.prod(shape))
    return torch.from_numpy(_bytes_of(tensor.path)[tensor.start : tensor.start + size]).view(shape)


def numbers_of(tensor: Tensor) -> torch.Tensor:
    """The numbers of a tensor in float32."""
    if tensor.kind in SCHEMES:
        return Blocks(mapped(tensor), SCHEMES[tensor.kind]).unpacked()
    dtype = _FLOATS[tensor.kind]
    size = tensor.elements * dtype.itemsize
    raw = torch.from_numpy(_bytes_of(tensor.path)[tensor.start : tensor.start + size].copy())
    return raw.view(dtype).view(tensor.shape).float()

"""Recurrent states of all layers: what a sequence carries from token to token beside its keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from engine.cache.lazy_memory import zeroed

_ALIGNMENT = 64
"""Bytes: where a state begins in its slot, so that vector instructions and views of any type can read it."""


class StateShape(NamedTuple):
    """One state of one layer: a tensor of ``shape`` numbers of ``dtype`` for each sequence."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """What it takes in a slot, padding included."""
        return -(-math.prod(self.shape) * int(self.dtype.itemsize) // _ALIGNMENT) * _ALIGNMENT


def slot_bytes(shapes: Sequence[StateShape]) -> int:
    """Bytes that the states of one sequence take over all layers."""
    return sum(shape.bytes for shape in shapes)


class StateCache:
    """``num_slots`` slots, each with the states of one sequence: ``states[i]`` is [slots, *shapes[i].shape].

    All states of a slot lie side by side, so that a slot is copied as a whole. Which slot belongs to whom is the
    business of ``engine.cache.sequence_memory``.
    """

    def __init__(self, shapes: Sequence[StateShape], num_slots: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.device = device
        width = slot_bytes(shapes)
        if device.type == "cpu" and width * num_slots:
            self._slots = torch.frombuffer(zeroed(width * num_slots), dtype=torch.uint8).view(num_slots, width)
        else:
            self._slots = torch.zeros(num_slots, width, dtype=torch.uint8, device=device)
        ends = [sum(shape.bytes for shape in shapes[: index + 1]) for index in range(len(shapes))]
        self.states = [
            self._slots[:, end - shape.bytes : end][:, : math.prod(shape.shape) * int(shape.dtype.itemsize)]
            .view(shape.dtype)
            .unflatten(1, shape.shape)
            for shape, end in zip(shapes, ends, strict=True)
        ]

    def clear(self, slots: torch.Tensor) -> None:
        """Set the states of ``slots`` [n] int64 to zero: those of a sequence before its first token."""
        self._slots.index_fill_(0, slots, 0)

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy the slots ``sources`` [n] int64 to the slots ``targets`` [n]."""
        self._slots.index_copy_(0, targets, self._slots[sources])

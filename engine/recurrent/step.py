"""Which tokens of a step belong to which state, as tensors on the device."""

from __future__ import annotations

from array import array
from typing import NamedTuple

import torch

from engine.scheduling.flat_batch import FlatBatch


class Prefill(NamedTuple):
    """The tokens ``[start, stop)`` of a step that continue the states in ``slot``, one after another."""

    start: int
    stop: int
    slot: int


class StateStep(NamedTuple):
    """The sequences of a step: ``decodes`` have one token each, which is row ``rows[i]``, in the slot ``slots[i]``.

    ``rows`` and ``slots`` are int64 on the device; ``rows`` is None where the decodes are all tokens of the step, in
    order.
    """

    rows: torch.Tensor | None
    slots: torch.Tensor
    prefills: list[Prefill]


def state_step(batch: FlatBatch, device: torch.device) -> StateStep:
    """The step of a batch that has ``state_slots``."""
    starts, lengths, slots = batch.query_starts, batch.query_lengths, batch.state_slots
    prefills = [Prefill(starts[i], starts[i] + lengths[i], slots[i]) for i in batch.prefills]
    if batch.only_decodes:
        return StateStep(None, on_device(slots, device), prefills)
    decodes = batch.decodes
    rows = array("i", [starts[i] for i in decodes])
    return StateStep(on_device(rows, device), on_device(array("i", [slots[i] for i in decodes]), device), prefills)


def on_device(numbers: array[int], device: torch.device) -> torch.Tensor:
    """Integers as an int64 tensor; on a GPU the copy does not wait for what was launched before."""
    if not numbers:
        return torch.empty(0, dtype=torch.long, device=device)
    staged = torch.frombuffer(numbers, dtype=torch.int32)
    if device.type == "cuda":
        staged = staged.pin_memory()
    return staged.to(device, non_blocking=True).long()

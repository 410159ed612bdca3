"""How much one block of the paged cache takes, and how many fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.api.errors import ModelRefused
from engine.cache.fp8 import SCALE_BYTES


class KVShape(NamedTuple):
    """What one token leaves behind in one layer: ``heads`` keys of ``key_size`` and values of ``value_size``.

    ``group`` is the layer group that the layer belongs to: a sequence has one block table for all layers of a group.
    Groups are numbered from 0. ``values_in_keys`` says that a value is the first ``value_size`` numbers of its key and
    takes no memory of its own (``engine.model.latent``).
    """

    heads: int
    key_size: int
    value_size: int
    group: int = 0
    values_in_keys: bool = False

    @property
    def numbers(self) -> int:
        """How many numbers that is."""
        return self.heads * (self.key_size + (0 if self.values_in_keys else self.value_size))


def num_groups(shapes: Iterable[KVShape]) -> int:
    """How many layer groups there are, and so how many block tables a sequence has."""
    return 1 + max((shape.group for shape in shapes), default=0)


# Of the memory for caches, the part that states of running sequences may take, and the part of their snapshots: these
# save prefill, but blocks are what long conversations need.
STATES_SHARE = 0.5
SNAPSHOTS_SHARE = 0.2
# Past some for each sequence that runs, snapshots are of conversations that nobody continues.
SNAPSHOTS_EACH = 8


@dataclass(frozen=True, slots=True)
class CachePlan:
    """How many blocks to make, the longest sequence that they are guaranteed to hold in tokens, how many sequences may
    run, and how many snapshots of recurrent states are kept."""

    num_blocks: int
    max_context: int
    max_running: int
    num_snapshots: int = 0

    @property
    def num_slots(self) -> int:
        """Slots for the states of running sequences and for snapshots."""
        return self.max_running + self.num_snapshots


def block_bytes(shapes: list[KVShape], block_size: int, dtype: torch.dtype, *, fp8: bool = False) -> int:
    """Bytes that one block takes over all layers. ``fp8`` stores a byte for each number and the scales."""
    item = 1 if fp8 else int(dtype.itemsize)
    scales = sum(shape.heads * (1 if shape.values_in_keys else 2) for shape in shapes) if fp8 else 0
    return block_size * (sum(shape.numbers for shape in shapes) * item + scales * SCALE_BYTES)


def plan_caches(
    budget: int, bytes_per_block: int, block_size: int, max_context: int, max_running: int, bytes_per_slot: int = 0
) -> CachePlan:
    """As many blocks as fit into ``budget`` bytes, but no more than all running sequences can use at full length.

    A budget below one sequence of ``max_context`` tokens shortens the context to what fits. Where layers carry states,
    ``bytes_per_slot`` for a sequence, fewer sequences may run than ``max_running`` asks for. Raises ``ModelRefused``
    where not even one block does, or not one sequence's states. Blocks of a model that never attends take nothing.
    """
    num_snapshots = 0
    if bytes_per_slot:
        max_running = min(max_running, int(budget * STATES_SHARE) // bytes_per_slot)
        num_snapshots = min(int(budget * SNAPSHOTS_SHARE) // bytes_per_slot, SNAPSHOTS_EACH * max_running)
    per_sequence = -(-max_context // block_size)
    left = budget - (max_running + num_snapshots) * bytes_per_slot
    fitting = left // bytes_per_block if bytes_per_block else per_sequence * max_running
    if fitting < 1 or max_running < 1:
        states = f" and the states of one sequence {bytes_per_slot}" if bytes_per_slot else ""
        raise ModelRefused(
            f"the KV cache may take {budget} bytes, but one block of {block_size} tokens takes {bytes_per_block}"
            f"{states}; raise kv_memory or free memory"
        )
    num_blocks = min(fitting, per_sequence * max_running)
    return CachePlan(num_blocks, min(max_context, num_blocks * block_size), max_running, num_snapshots)

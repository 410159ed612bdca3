"""How much one block of the paged cache takes, and how many fit. No torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from engine.api.block_groups import BlockGroup, Window, sequence_blocks
from engine.api.errors import ModelRefused

SCALE_BYTES = 1
"""Of a scale of ``engine.cache.fp8``."""


class NumberType(Protocol):
    """A type of numbers, torch's or NumPy's."""

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        ...


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
# The length of a sequence, in tokens, by which memory is split between layers with and without a window.
TYPICAL = 4096
# Past some for each sequence that runs, snapshots are of conversations that nobody continues.
SNAPSHOTS_EACH = 8


@dataclass(frozen=True, slots=True)
class CachePlan:
    """How many blocks each layer group gets, the longest sequence that they are guaranteed to hold in tokens, how many
    sequences may run, and how many snapshots of recurrent states are kept."""

    groups: tuple[BlockGroup, ...]
    max_context: int
    max_running: int
    num_snapshots: int = 0

    @property
    def num_slots(self) -> int:
        """Slots for the states of running sequences and for snapshots."""
        return self.max_running + self.num_snapshots


def block_bytes(shapes: list[KVShape], block_size: int, dtype: NumberType, *, fp8: bool = False) -> int:
    """Bytes that one block takes over all layers. ``fp8`` stores a byte for each number and the scales."""
    item = 1 if fp8 else dtype.itemsize
    scales = sum(shape.heads * (1 if shape.values_in_keys else 2) for shape in shapes) if fp8 else 0
    return block_size * (sum(shape.numbers for shape in shapes) * item + scales * SCALE_BYTES)


class GroupDemand(NamedTuple):
    """What a layer group needs: the bytes of one block over all its layers, and how much of the past these see."""

    bytes_per_block: int
    window: Window | None = None


def group_demands(
    shapes: list[KVShape], windows: Sequence[Window | None], block_size: int, dtype: NumberType, *, fp8: bool = False
) -> list[GroupDemand]:
    """What each layer group needs."""
    by_group = ([shape for shape in shapes if shape.group == group] for group in range(len(windows)))
    each = (block_bytes(shapes, block_size, dtype, fp8=fp8) for shapes in by_group)
    return [GroupDemand(number, window) for number, window in zip(each, windows, strict=True)]


def sequence_bytes(demands: Sequence[GroupDemand], tokens: int, block_size: int) -> int:
    """Bytes of the blocks that a sequence of so many tokens holds once they are computed."""
    blocks = (sequence_blocks(demand.window, tokens, block_size, 1) for demand in demands)
    return sum(count * demand.bytes_per_block for count, demand in zip(blocks, demands, strict=True))


def plan_caches(
    budget: int,
    demands: Sequence[GroupDemand],
    block_size: int,
    max_context: int,
    max_running: int,
    *,
    launched: int = 1,
    bytes_per_slot: int = 0,
) -> CachePlan:
    """As many blocks as fit into ``budget`` bytes, but no more than all running sequences can use at full length.

    Between layer groups the budget is split as if one sequence of the full context were computed, with ``launched`` of
    its tokens at once, and beside it as many of ``TYPICAL`` tokens as fit, or where all others fit, longer ones of
    equal length. What is left goes to the first group. A budget below the one sequence shortens the context to what
    fits. Where layers carry states, ``bytes_per_slot`` for a sequence, fewer sequences may run than ``max_running``
    asks for. Blocks of a model that never attends take nothing. Raises ``ModelRefused`` where not even one block fits,
    or not one sequence's states.
    """
    num_snapshots = 0
    if bytes_per_slot:
        max_running = min(max_running, int(budget * STATES_SHARE) // bytes_per_slot)
        num_snapshots = min(int(budget * SNAPSHOTS_SHARE) // bytes_per_slot, SNAPSHOTS_EACH * max_running)
    left = budget - (max_running + num_snapshots) * bytes_per_slot

    def blocks(tokens: int, launched: int) -> list[int]:
        return [sequence_blocks(demand.window, tokens, block_size, launched) for demand in demands]

    def size(counts: Sequence[int]) -> int:
        return sum(count * demand.bytes_per_block for count, demand in zip(counts, demands, strict=True))

    per_sequence = -(-max_context // block_size)
    longest = _most(per_sequence, lambda count: size(blocks(count * block_size, launched)) <= left)
    if longest < 1 or max_running < 1:
        states = f" and the states of one sequence {bytes_per_slot}" if bytes_per_slot else ""
        raise ModelRefused(
            f"the KV cache may take {budget} bytes, but one block of {block_size} tokens takes {size(blocks(1, 1))}"
            f"{states}; raise kv_memory or free memory"
        )
    one = blocks(longest * block_size, launched)
    left -= size(one)
    others = max_running - 1
    equal = _most(longest, lambda count: others * size(blocks(count * block_size, 1)) <= left) * block_size
    each = blocks(max(equal, min(TYPICAL, longest * block_size)), 1)
    fitting = min(others, left // size(each)) if size(each) else others
    counts = [first + fitting * count for first, count in zip(one, each, strict=True)]
    left -= fitting * size(each)
    if demands[0].bytes_per_block:
        most = blocks(longest * block_size, launched)[0] + others * blocks(longest * block_size, 1)[0]
        counts[0] = min(most, counts[0] + left // demands[0].bytes_per_block)
    groups = tuple(BlockGroup(count, demand.window) for count, demand in zip(counts, demands, strict=True))
    return CachePlan(groups, min(max_context, longest * block_size), max_running, num_snapshots)


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``limit`` that ``fits``, as all smaller ones do; 0 where none does."""
    return bisect_left(range(1, limit + 1), True, key=lambda count: not fits(count))

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
    Groups are numbered from 0.
    """

    heads: int
    key_size: int
    value_size: int
    group: int = 0


def num_groups(shapes: Iterable[KVShape]) -> int:
    """How many layer groups there are, and so how many block tables a sequence has."""
    return 1 + max((shape.group for shape in shapes), default=0)


@dataclass(frozen=True, slots=True)
class KVPlan:
    """How many blocks to make and the longest sequence that they are guaranteed to hold, in tokens."""

    num_blocks: int
    max_context: int


def block_bytes(shapes: list[KVShape], block_size: int, dtype: torch.dtype, *, fp8: bool = False) -> int:
    """Bytes that one block takes over all layers. ``fp8`` stores a byte for each number and the scales."""
    item, scales = (1, 2 * SCALE_BYTES) if fp8 else (int(dtype.itemsize), 0)
    return block_size * sum(shape.heads * ((shape.key_size + shape.value_size) * item + scales) for shape in shapes)


def plan_blocks(budget: int, bytes_per_block: int, block_size: int, max_context: int, max_running: int) -> KVPlan:
    """As many blocks as fit into ``budget`` bytes, but no more than ``max_running`` full sequences can use.

    A budget below one sequence of ``max_context`` tokens shortens the context to what fits. Raises ``ModelRefused``
    where not even one block does.
    """
    fitting = budget // bytes_per_block
    if fitting < 1:
        raise ModelRefused(
            f"the KV cache may take {budget} bytes, but one block of {block_size} tokens takes {bytes_per_block}; "
            "raise kv_memory or free memory"
        )
    per_sequence = -(-max_context // block_size)
    num_blocks = min(fitting, per_sequence * max_running)
    return KVPlan(num_blocks, min(max_context, num_blocks * block_size))

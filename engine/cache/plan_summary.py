"""The log lines about a plan of the cache. No torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from engine.api.block_groups import sequence_blocks
from engine.cache.layout import CachePlan, GroupDemand

_log = logging.getLogger(__name__)


def log_blocks(plan: CachePlan, block_size: int, kind: str, demands: Sequence[GroupDemand]) -> None:
    """How many blocks of ``kind`` numbers there are, and what fits into them."""
    counts = [group.num_blocks for group in plan.groups]
    whole = [sequence_blocks(demand.window, plan.max_context, block_size, 1) for demand in demands]
    _log.info(
        "KV cache: %d tokens of %s in %.0f MiB, %d bytes a token, %.1f sequences at the full context of %d tokens",
        counts[0] * block_size,
        kind,
        sum(count * demand.bytes_per_block for count, demand in zip(counts, demands, strict=True)) / 2**20,
        sum(demand.bytes_per_block for demand in demands) // block_size,
        min(count / needed for count, needed in zip(counts, whole, strict=True)),
        plan.max_context,
    )
    for group, demand, needed in zip(plan.groups, demands, whole, strict=True):
        if group.window is not None:
            _log.info(
                "Layers with a %s keep %d tokens, %d bytes a token, and up to %d of one sequence while it is decoded",
                group.window,
                group.num_blocks * block_size,
                demand.bytes_per_block // block_size,
                needed * block_size,
            )


def log_context(plan: CachePlan, max_context: int, limit: str) -> None:
    """What shortened the context: the model's own ``limit``, if any, and a plan that holds less."""
    if limit:
        _log.warning("The context is %d tokens: %s", max_context, limit)
    if plan.max_context < max_context:
        _log.warning(
            "The context is shortened from %d to %d tokens, all that the KV cache holds; raise kv_memory for more",
            max_context,
            plan.max_context,
        )

"""Describes a loaded model: the ``ModelInfo`` for the front end, and the log lines about its memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from engine.api.engine import EngineConfig, ModelInfo
from engine.cache.layout import CachePlan, GroupDemand
from engine.cache.plan_summary import log_blocks, log_context
from engine.cache.state_tensors import slot_bytes
from engine.device.device_memory import idle_bytes
from engine.model.loader import LoadedModel
from engine.packed.modules import num_parameters

_log = logging.getLogger(__name__)


def model_info(model: LoadedModel, plan: CachePlan, config: EngineConfig, eos_ids: Iterable[int]) -> ModelInfo:
    """What the engine reports about itself. ``eos_ids`` outside the vocabulary are dropped."""
    module = model.module
    return ModelInfo(
        model_type=module.config.model_type,
        num_parameters=num_parameters(module),
        dtype=str(module.dtype).removeprefix("torch."),
        device=str(module.device),
        vocab_size=model.probe.vocab_size,
        max_context=plan.max_context,
        block_size=config.block_size,
        groups=plan.groups,
        max_running=plan.max_running,
        eos_ids=tuple(sorted(token for token in eos_ids if 0 <= token < model.probe.vocab_size)),
        state_bytes=slot_bytes(model.probe.states),
        num_snapshots=plan.num_snapshots,
        original_context=0 if model.long_rope is None else model.long_rope.original,
        context_limit=model.limit if plan.max_context == model.max_context else "",
    )


def log_summary(
    model: LoadedModel,
    plan: CachePlan,
    config: EngineConfig,
    max_running: int,
    demands: Sequence[GroupDemand],
    step_bytes: int = 0,
) -> None:
    """Log how much fits, and what limited it.

    ``max_running`` is what was asked for, ``step_bytes`` what steps take beside weights and caches.
    """
    kind = "fp8" if config.kv_dtype == "fp8" else str(model.module.dtype).removeprefix("torch.")
    log_blocks(plan, config.block_size, kind, demands)
    if per_slot := slot_bytes(model.probe.states):
        _log.info(
            "Recurrent states: %.1f MiB a sequence; %d sequences can run, and %d snapshots are kept, in %.0f MiB",
            per_slot / 2**20,
            plan.max_running,
            plan.num_snapshots,
            plan.num_slots * per_slot / 2**20,
        )
    if plan.max_running < max_running:
        _log.warning(
            "At most %d sequences run at once and not %d, because their states take %.1f MiB each; raise kv_memory",
            plan.max_running,
            max_running,
            per_slot / 2**20,
        )
    if step_bytes:
        _log.info(
            "Beside weights and cache, the largest steps take up to %.0f MiB; torch holds %.0f MiB that nothing uses",
            step_bytes / 2**20,
            idle_bytes(model.module.device) / 2**20,
        )
    if model.long_rope is not None:
        _log.info(
            "Texts of more than %d tokens are rotated by the long factors; one that grows beyond is computed again",
            model.long_rope.original,
        )
    log_context(plan, model.max_context, model.limit)

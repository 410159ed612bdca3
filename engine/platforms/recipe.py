"""Starts a model, the same way on every platform: load, rewrite, profile, plan, bind, capture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from threading import Thread

import torch

from engine.api.block_groups import BlockGroup
from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.cache.kv_tensors import KVCache
from engine.cache.layout import CachePlan, GroupDemand, group_demands, plan_caches
from engine.cache.state_tensors import StateCache, slot_bytes
from engine.device.device_memory import (
    advice_on,
    held_bytes,
    hold_bytes,
    refused_without_memory,
    release_idle,
    size,
    who_holds,
)
from engine.image.keep import keep_image
from engine.image.sample import digest_of_logits
from engine.model.loader import LoadedModel, Progress, resolve_device
from engine.model.summary import log_summary, model_info
from engine.native.errors import WeightsGone
from engine.native.runner import NativeRunner
from engine.platforms.base import Platform
from engine.platforms.cpu import CpuPlatform
from engine.platforms.cuda import CudaPlatform
from engine.recurrent.states import RecurrentStates
from engine.runner.torch_runner import ModelRunner
from engine.scheduling.chunk_budget import most_launched
from engine.scheduling.contracts import Runner

_log = logging.getLogger(__name__)


def platform_of(device: torch.device) -> Platform:
    """The platform that a device belongs to."""
    return CudaPlatform(device) if device.type == "cuda" else CpuPlatform()


def start_model(
    load: Callable[[], LoadedModel],
    config: EngineConfig,
    eos_ids: Iterable[int],
    progress: Progress,
    platform: Platform | None = None,
) -> Runner:
    """The runner of a model, with a cache as large as the configured memory allows. Raises ``ModelRefused``.

    ``eos_ids`` are end tokens beside those of the model's own configuration. ``platform`` is by default that of the
    device that the model was loaded to.
    """
    (platform or platform_of(resolve_device(config.device))).check(config)
    model = load()
    platform = platform or platform_of(model.module.device)
    device, dtype = model.module.device, model.module.dtype
    eos_ids = {*model.config_eos_ids, *eos_ids}
    max_running = config.max_running or platform.max_running
    with refused_without_memory("joining weights", device, advice_on(device)):
        platform.rewrite(model, progress)

    no_blocks = tuple(BlockGroup(1, window) for window in model.probe.windows)
    unplanned = model_info(model, CachePlan(no_blocks, model.max_context, max_running), config, eos_ids)
    attention, reserved = platform.profile(model, unplanned, config, progress)

    progress("allocating cache", 0.0)
    demands = group_demands(
        model.probe.shapes, model.probe.windows, config.block_size, dtype, fp8=config.kv_dtype == "fp8"
    )
    plan, cache, states = _allocate_caches(model, config, max_running, platform, demands, reserved)
    info = model_info(model, plan, config, eos_ids)
    log_summary(model, plan, config, max_running, demands, reserved)

    held = held_bytes(device)
    try:
        runner = platform.bind(model, attention, cache, states, info, config, progress)
    except WeightsGone as error:
        reason = str(error)  # as text: keeping the exception would keep the packed weights that its frames hold
    else:
        platform.capture(runner, [group.num_blocks for group in plan.groups], config, progress)
        try:
            hold_bytes(device, reserved - (held_bytes(device) - held))  # recordings have taken their part of it
        except torch.OutOfMemoryError:
            _log.warning(
                "The largest steps take %s and may fail: %s; lower kv_memory", size(reserved), who_holds(device)
            )
        _keep(model, runner, cache, config)
        return runner
    _log.warning("Computed by torch, which is slower, and not natively: %s", reason)
    # Only here, after the exception and with it the packed weights are freed: the memory may not hold both.
    del model
    model = load()
    runner = ModelRunner(model, attention(cache), info, RecurrentStates(states))
    _keep(model, runner, cache, config)
    return runner


def _keep(model: LoadedModel, runner: Runner, cache: KVCache, config: EngineConfig) -> None:
    """Keep for the next start what this one has made. Nobody waits until the disk has it."""
    panels = model.panels
    if panels is None:
        return
    # Here, while the runner computes nothing else.
    logits = digest_of_logits(runner) if isinstance(runner, NativeRunner) else ""

    def keep() -> None:
        if panels.finish() and isinstance(runner, NativeRunner):
            keep_image(model, runner, cache, config, logits)

    Thread(target=keep, name="keep-model", daemon=True).start()


def _allocate_caches(
    model: LoadedModel,
    config: EngineConfig,
    max_running: int,
    platform: Platform,
    demands: list[GroupDemand],
    reserved: int,
) -> tuple[CachePlan, KVCache, StateCache]:
    """As many blocks as the memory allows, and recurrent states. Raises ``ModelRefused``.

    Servers that start at once on one GPU find the same memory free. The one that comes second measures again, once.
    """
    device, measured_again = model.module.device, False
    per_slot, scratch = slot_bytes(model.probe.states), platform.scratch_blocks
    every_block = sum(demand.bytes_per_block for demand in demands)
    while True:
        budget = max(0, platform.cache_bytes(config.kv_memory, reserved) - scratch * (every_block + per_slot))
        try:
            plan = plan_caches(
                budget,
                demands,
                config.block_size,
                model.max_context,
                max_running,
                launched=most_launched(ahead=platform.runs_ahead),
                bytes_per_slot=per_slot,
            )
        except ModelRefused as refusal:
            raise ModelRefused(f"{refusal}; {who_holds(device)}") from None
        num_blocks, num_slots = [group.num_blocks + scratch for group in plan.groups], plan.num_slots + scratch
        block_bytes = sum(count * demand.bytes_per_block for count, demand in zip(num_blocks, demands, strict=True))
        cache_size = size(block_bytes + num_slots * per_slot)
        purpose = f"a KV cache of {cache_size} beside {size(reserved)} for steps"
        with refused_without_memory(purpose, device, f"lower kv_memory, or free memory on {device}"):
            try:
                cache = KVCache(
                    model.probe.shapes,
                    num_blocks,
                    config.block_size,
                    dtype=model.module.dtype,
                    device=device,
                    fp8=config.kv_dtype == "fp8",
                )
                return plan, cache, StateCache(model.probe.states, num_slots, device)
            except torch.OutOfMemoryError:
                if measured_again:
                    raise
        release_idle(device)
        measured_again = True

"""The runner of a GPU: joined weights, our kernels, a cache sized after a trial, recorded decode steps."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.cache.kv_tensors import KVCache
from engine.cache.layout import KVPlan, block_bytes, plan_blocks
from engine.cache.memory import free_bytes, memory_budget
from engine.model.loader import LoadedModel, Progress
from engine.model.summary import log_summary, model_info
from engine.runner.cuda_graphs import CudaRecorder, Recorder
from engine.runner.fused_linear import fuse
from engine.runner.memory_profile import Attention, attention_for, try_steps
from engine.runner.torch_runner import ModelRunner

_log = logging.getLogger(__name__)


def gpu_runner(
    model: LoadedModel,
    config: EngineConfig,
    eos_ids: Iterable[int],
    progress: Progress,
    *,
    attention: Attention | None = None,
    record: Recorder | None = None,
) -> ModelRunner:
    """Make the runner of a model that was loaded to a GPU. Raises ``ModelRefused``.

    ``attention`` and ``record`` are for those who compare, and for tests on a CPU.
    """
    module, device = model.module, model.module.device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton, streams and graphs follow the current device, not the tensors
    progress("joining weights", 0.0)
    with _refused_without_memory("joining weights", device, "free memory there, or serve a smaller model"):
        fuse(module)
        _shorten(model)
    progress("trying the largest step", 0.0)
    trial_info = model_info(model, KVPlan(1, model.max_context), config, eos_ids)
    make_attention, reserved = try_steps(model, trial_info, config, attention or attention_for(device))
    progress("allocating cache", 0.0)
    shapes = [layer.shape for layer in model.probe.layers]
    per_block = block_bytes(shapes, config.block_size, module.dtype)
    # One block beyond the pool's is for what pads recorded steps.
    budget = max(0, memory_budget(config.kv_memory, device, reserved) - per_block)
    plan = plan_blocks(budget, per_block, config.block_size, model.max_context, trial_info.max_running)
    purpose = f"a KV cache of {(plan.num_blocks + 1) * per_block} bytes"
    with _refused_without_memory(purpose, device, "lower kv_memory, or free memory there", reserved):
        cache = KVCache(shapes, plan.num_blocks + 1, config.block_size, dtype=module.dtype, device=device)
    backend = make_attention(cache, {layer.sliding_window for layer in model.probe.layers})
    log_summary(model, plan, config.block_size, per_block, reserved)
    runner = ModelRunner(model, backend, model_info(model, plan, config, eos_ids))
    if config.cuda_graphs:
        _record_decodes(runner, plan.num_blocks, record, progress)
    return runner


@contextmanager
def _refused_without_memory(purpose: str, device: torch.device, advice: str, reserved: int = 0) -> Iterator[None]:
    """Raise ``ModelRefused`` where memory runs out: loading again would find no more of it."""
    free = free_bytes(device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelRefused(
            f"there is not enough memory on {device} for {purpose}: {free} bytes are free and {reserved} of them kept "
            f"for steps; {advice}"
        ) from error


def _shorten(model: LoadedModel) -> None:
    try:
        from engine.runner.fused_ops import shorten
    except ImportError:
        return  # without Triton; that was said where the attention was chosen
    shorten(model.module, model.probe)


def _record_decodes(runner: ModelRunner, scratch_block: int, record: Recorder | None, progress: Progress) -> None:
    """Have decode steps replayed where they can be recorded; else they are computed as all others are."""
    try:
        runner.record_decodes(scratch_block, record or CudaRecorder(), progress)
    except RuntimeError as error:
        runner.check()  # which also waits until nothing uses the memory of the recordings any more
        if isinstance(error, torch.OutOfMemoryError):
            reason = "there is no memory for it; lower kv_memory"
        else:
            reason = str(error).strip().partition("\n")[0]
        _log.warning("Decode steps are not recorded and will be slower: %s", reason)

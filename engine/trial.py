"""The largest steps that can come, tried at load: whether the device computes them, and what memory they take.

What is left after that is the cache's. Kernels are compiled here too, so that the first request does not wait for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch

from engine.attention.base import AttentionBackend
from engine.attention.reference import ReferenceAttention
from engine.batch import Sequence, Work
from engine.kv import KVCache
from engine.model import LoadedModel
from engine.pacing import MAX_CHUNK
from engine.runner import ModelRunner
from engine.sampling import BatchSampler
from engine.types import EngineConfig, ModelInfo, ModelRefused, Request, SamplingParams

_log = logging.getLogger(__name__)

Attention = Callable[[KVCache, Iterable[int | None]], AttentionBackend]
# All tokens are equally likely in a trial, so that the sampler must look at the whole vocabulary.
_SAMPLING = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9, logprobs=20)


def attention_for(device: torch.device) -> Attention:
    """The backend of a device: our kernels on a GPU, unless Triton is missing."""
    if device.type != "cuda":
        return ReferenceAttention
    try:
        from engine.attention.triton_paged import TritonAttention
    except ImportError as error:
        _log.warning("Triton cannot be imported (%s): attention copies the whole past at each step, slowly", error)
        return ReferenceAttention
    return TritonAttention


def try_steps(model: LoadedModel, info: ModelInfo, config: EngineConfig, attention: Attention) -> tuple[Attention, int]:
    """Run the largest steps on a GPU; returns the backend that can, and the bytes to keep for steps.

    Raises ``ModelRefused`` where the memory does not even hold the steps.
    """
    try:
        return attention, step_bytes(model, info, config, attention)
    except torch.OutOfMemoryError as error:
        raise ModelRefused(
            f"the weights leave no room for a step of {MAX_CHUNK} tokens and {config.max_running} answers; lower "
            f"max_running, or free memory on {info.device}"
        ) from error
    except Exception as error:
        if attention is ReferenceAttention:
            raise
        _log.warning("The Triton kernels do not run here; attention will be slow: %s", _first_line(error))
    return try_steps(model, info, config, ReferenceAttention)


def step_bytes(model: LoadedModel, info: ModelInfo, config: EngineConfig, attention: Attention) -> int:
    """What steps take at most beside weights and pages.

    Once for a step with as much prefill as the scheduler may ever allow; once more for the recorded decodes
    (``engine.graphs``), which keep the memory of theirs. The model is left bound to a cache of one block, in which all
    tokens lie: what they compute is meaningless.
    """
    layers = model.probe.layers
    device = torch.device(info.device)
    cache = KVCache([layer.shape for layer in layers], 1, info.block_size, dtype=model.module.dtype, device=device)
    runner = ModelRunner(model, attention(cache, {layer.sliding_window for layer in layers}), info)
    _peak(runner, decode_step(info)[:1])  # small and large steps may have kernels of their own
    decodes = _peak(runner, decode_step(info))
    prefill = _peak(runner, prefill_step(info))
    return prefill + (decodes if config.cuda_graphs else 0)


def decode_step(info: ModelInfo) -> list[Work]:
    """As many decodes as can run."""
    return [_work(info, 1) for _ in range(info.max_running)]


def prefill_step(info: ModelInfo) -> list[Work]:
    """``MAX_CHUNK`` tokens of prefill, in prompts as long as they may be, and decodes up to the limit of sequences."""
    whole, rest = divmod(MAX_CHUNK, info.max_context)
    lengths = [info.max_context] * whole + [rest] * (rest > 0)
    # Short prompts are more than can run at once: then so many are the largest step.
    lengths = lengths[: info.max_running]
    return [_work(info, length) for length in lengths + [1] * (info.max_running - len(lengths))]


def _work(info: ModelInfo, num_tokens: int) -> Work:
    blocks = [0] * -(-num_tokens // info.block_size)
    tokens = [0] * num_tokens
    return Work(Sequence(Request("trial", (0,), _SAMPLING), 0, tokens, blocks=blocks), 0, num_tokens)


def _peak(runner: ModelRunner, batch: list[Work]) -> int:
    """Bytes that a step and its sampling take at their highest; 0 on a CPU."""
    device = torch.device(runner.info.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    logits = runner.forward(batch)
    BatchSampler().sample(torch.zeros_like(logits), [work.sequence for work in batch], [None] * len(batch))
    if not on_gpu:
        return 0
    torch.cuda.synchronize(device)
    peak = int(torch.cuda.max_memory_allocated(device)) - before
    del logits
    torch.cuda.empty_cache()
    return peak


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

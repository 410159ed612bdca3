"""Profiles the peak memory of the largest step at load, and finds out whether our kernels run.

The cache gets what is left. Kernels are compiled here too, so that the first request does not wait for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from engine.api.engine import EngineConfig, ModelInfo
from engine.api.errors import ModelRefused
from engine.api.requests import Request
from engine.api.sampling import everything_on
from engine.attention.base import AttentionBackend
from engine.attention.gather import ReferenceAttention
from engine.cache.kv_tensors import KVCache
from engine.cache.state_tensors import StateCache
from engine.constraints.masks import Mask, all_but
from engine.device.cuda_health import DeviceError, device_errors
from engine.device.device_memory import who_holds
from engine.model.loader import LoadedModel
from engine.recurrent.states import RecurrentStates
from engine.runner.cuda_graphs import recorded_shapes
from engine.runner.torch_runner import ModelRunner
from engine.sampling.device import DeviceSampler
from engine.scheduling.chunk_budget import MAX_CHUNK
from engine.scheduling.sequence import ScheduledChunk, Sequence

_log = logging.getLogger(__name__)

Attention = Callable[[KVCache], AttentionBackend]
_REMEDY = "at run time Triton needs a C compiler (cc, gcc or clang, or what CC names) and the headers of Python"
# All tokens are equally likely in the profile, so that the sampler must look at the whole vocabulary.
_SAMPLING = everything_on()


def profile_steps(
    model: LoadedModel, info: ModelInfo, config: EngineConfig, attention: Attention
) -> tuple[Attention, int]:
    """Run the largest steps with ``attention``, or with the reference where its kernels do not run here.

    Returns the backend that ran, and the bytes to keep for steps. Raises ``ModelRefused`` if the memory does not even
    hold the steps, and passes on the model's own errors.
    """
    try:
        with device_errors(torch.device(info.device)):
            return attention, step_bytes(model, info, config, attention)
    except torch.OutOfMemoryError as error:
        raise ModelRefused(
            f"the weights leave no room for a step of {MAX_CHUNK} tokens and {info.max_running} answers: "
            f"{who_holds(torch.device(info.device))}; lower max_running, or free memory on {info.device}"
        ) from error
    except DeviceError as error:
        if attention is ReferenceAttention:
            raise error.cause from None
        reason = str(error)
    # An error that occurs without our kernels too is the model's own, and is raised as such.
    profiled = profile_steps(model, info, config, ReferenceAttention)
    _log.warning("The Triton kernels do not run here; attention will be slow: %s; %s", reason, _REMEDY)
    return profiled


def step_bytes(model: LoadedModel, info: ModelInfo, config: EngineConfig, attention: Attention) -> int:
    """The peak memory of steps on the device, beside weights and cache, in bytes.

    The sum of two parts. The first is what torch must allocate, beyond what it holds already, for a step with as much
    prefill as the scheduler may ever allow, and its sampling. The second is for the recorded steps (``cuda_graphs``),
    which have memory of their own and can use none that is held elsewhere: the largest of the decodes, and the largest
    with prefill, because one may not fit into the pieces of the other; and the largest recorded sampling. The model is
    left bound to caches of one block and one slot that all tokens share, so its results are meaningless.
    """
    device = torch.device(info.device)
    fp8 = config.kv_dtype == "fp8"
    cache = KVCache(model.probe.shapes, 1, info.block_size, dtype=model.module.dtype, device=device, fp8=fp8)
    states = RecurrentStates(StateCache(model.probe.states, 1, device))
    runner = ModelRunner(model, attention(cache), info, states)
    _memory_of(lambda: runner.forward(decode_step(info)[:1]), device)  # small steps may have kernels of their own
    recorded = 0
    for step in filter(None, [decode_step(info), recorded_prefill_step(info)] if config.cuda_graphs else []):
        recorded += _memory_of(partial(runner.forward, step), device).used
    if config.cuda_graphs:
        recorded += _memory_of(lambda: _recorded_sampling(runner), device).used
    prefill = _memory_of(lambda: _whole_step(runner, prefill_step(info)), device)
    return prefill.taken + recorded


def decode_step(info: ModelInfo) -> list[ScheduledChunk]:
    """As many decodes as can run."""
    return [_chunk(info, 1) for _ in range(info.max_running)]


def recorded_prefill_step(info: ModelInfo) -> list[ScheduledChunk]:
    """The largest recorded step with prefill, of as many sequences as can be, which all sample; empty if none is."""
    sizes = [shape.tokens for shape in recorded_shapes(info)[1]]
    if not sizes:
        return []
    decodes = min(info.max_running, sizes[-1]) - 1
    return [_chunk(info, sizes[-1] - decodes), *(_chunk(info, 1) for _ in range(decodes))]


def prefill_step(info: ModelInfo) -> list[ScheduledChunk]:
    """``MAX_CHUNK`` tokens of prefill, in prompts as long as they may be, and decodes up to the limit of sequences."""
    whole, rest = divmod(MAX_CHUNK, info.max_context)
    lengths = [info.max_context] * whole + [rest] * (rest > 0)
    # With a short context these may be more prompts than can run at once: then that many are the largest step.
    lengths = lengths[: info.max_running]
    return [_chunk(info, length) for length in lengths + [1] * (info.max_running - len(lengths))]


def _chunk(info: ModelInfo, num_tokens: int) -> ScheduledChunk:
    blocks = [0] * -(-num_tokens // info.block_size)
    # Penalties count distinct tokens, and the more there are, the more memory that takes.
    tokens = [index % info.vocab_size for index in range(num_tokens)]
    request, others = Request("profile", (0,), _SAMPLING), (blocks,) * (len(info.groups) - 1)
    return ScheduledChunk(Sequence(request, 0, tokens, blocks=blocks, other_tables=others), 0, num_tokens)


def _recorded_sampling(runner: ModelRunner) -> None:
    """What is recorded for the largest batch, with the place of its logits."""

    def once(compute: Callable[[], None]) -> Callable[[], None]:
        compute()
        return compute

    info = runner.info
    logits = torch.zeros(info.max_running, info.vocab_size, device=runner.sampled.device)
    DeviceSampler(logits, runner.sampled, [info.max_running], once)


def _whole_step(runner: ModelRunner, batch: list[ScheduledChunk]) -> None:
    """A step with every sampling feature, beside another one that was launched and is not read.

    One row has no mask, which takes more memory than if all had one.
    """
    logits = torch.zeros_like(runner.forward(batch))
    sequences = [chunk.sequence for chunk in batch]
    masks: list[Mask | None] = [None, *[all_but((), logits.shape[1])] * (len(batch) - 1)]
    sampler = DeviceSampler(logits, runner.sampled, [len(batch)])
    before = sampler.launch(logits, sequences, masks, [None] * len(batch))
    sampler.launch(logits, sequences, masks, [*range(len(batch))])
    sampler.finish(before)


class _Memory(NamedTuple):
    """Peak bytes: ``used`` by tensors, and ``taken`` from the device for them beyond what torch held already."""

    used: int
    taken: int


def _memory_of(compute: Callable[[], object], device: torch.device) -> _Memory:
    """The memory that ``compute`` needs on top of what is in use; zero on a CPU."""
    if device.type != "cuda":
        compute()
        return _Memory(0, 0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    used, taken = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    compute()
    torch.cuda.synchronize(device)
    memory = _Memory(torch.cuda.max_memory_allocated(device) - used, torch.cuda.max_memory_reserved(device) - taken)
    torch.cuda.empty_cache()
    return memory

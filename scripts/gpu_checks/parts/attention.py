"""Does our attention match the formula? One layer of each form, in every kind of step, on the device itself."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.api.requests import Request
from engine.attention.base import AttentionOptions
from engine.attention.gather import ReferenceAttention
from engine.cache.fp8 import dequantise, quantise
from engine.cache.kv_tensors import KVCache
from engine.cache.layout import KVShape
from engine.platforms.cuda import CudaPlatform
from engine.scheduling.flat_batch import flatten
from engine.scheduling.sequence import ScheduledChunk, Sequence
from gpu_checks.check import Check
from gpu_checks.machine import Machine
from gpu_checks.models import BLOCK_SIZE, GREEDY
from gpu_checks.report import reason_of

PART = "correctness"
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class Form(NamedTuple):
    """The form of a layer: its query heads, its cache, and what changes the scores."""

    heads: int
    shape: KVShape
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    fp8: bool = False


FORMS = {
    "llama": Form(32, KVShape(8, 128, 128)),
    "one head each": Form(8, KVShape(8, 64, 64)),
    "gemma2": Form(16, KVShape(8, 256, 256), 300, 50.0),
    "gpt-oss": Form(64, KVShape(8, 64, 64), 128, None, True),
    "head size 512": Form(8, KVShape(1, 512, 512)),
    "no power of two": Form(6, KVShape(2, 80, 80), 33, None, True),
    "keys unlike values": Form(16, KVShape(16, 192, 128)),
    "glm-4.7-flash": Form(20, KVShape(1, 576, 512, values_in_keys=True)),
    "deepseek-v3": Form(128, KVShape(1, 576, 512, values_in_keys=True)),
    "llama with fp8": Form(32, KVShape(8, 128, 128), fp8=True),
    "gemma2 with fp8": Form(16, KVShape(8, 256, 256), 300, 50.0, fp8=True),
    "gpt-oss with fp8": Form(64, KVShape(8, 64, 64), 128, None, True, fp8=True),
    "glm-4.7-flash with fp8": Form(20, KVShape(1, 576, 512, values_in_keys=True), fp8=True),
}
Step = tuple[tuple[int, int], ...]
# Tokens in the cache and new tokens.
STEPS: dict[str, Step] = {
    "decodes": ((0, 1), (15, 1), (16, 1), (700, 1), (3000, 1)),
    "one long decode": ((5000, 1),),
    "chunks": ((0, 100), (100, 65), (1000, 200)),
    "mixed": ((0, 70), (400, 1), (2, 1), (130, 35), (0, 1)),
    # Enough to keep a device of 132 processors busy with one program each, even with one key head: no splits.
    "many decodes": tuple((7 * i % 400, 1) for i in range(300)),
    "a ragged batch": ((32_768, 1), *((200, 1),) * 63),
}
SMOKE_STEPS: dict[str, Step] = {"mixed": ((0, 7), (40, 1), (2, 1)), "a ragged batch": ((70, 1), (5, 1), (5, 1))}
LONG_CHUNK = 16_384


def compare_attention(check: Check) -> None:
    """Report each form in each type: the worst of all steps, and of a long chunk."""
    smoke = check.machine.smoke
    lacking = fp8_is_lacking(check.machine)
    for name in ["no power of two", "llama with fp8"] if smoke else FORMS:
        if FORMS[name].fp8 and lacking:
            check.report.skipped(PART, f"attention, {name}", lacking)
            continue
        for dtype in [torch.float32] if smoke else ALLOWED:
            title = f"attention, {name}, {str(dtype).removeprefix('torch.')}"
            if check.has_time(PART, title, 2.0):
                _compare(check, title, FORMS[name], dtype)
                check.machine.forget()


def fp8_is_lacking(machine: Machine) -> str:
    """Why keys and values cannot be fp8 here; "" if they can."""
    try:
        CudaPlatform(machine.device).check(EngineConfig("", kv_dtype="fp8"))
    except ModelRefused as refusal:
        return str(refusal)
    return ""


def _compare(check: Check, title: str, form: Form, dtype: torch.dtype) -> None:
    machine, worst, at = check.machine, 0.0, ""
    sinks = torch.linspace(-1, 3, form.heads, device=machine.device, dtype=dtype) if form.has_sinks else None
    options = AttentionOptions(form.shape.key_size**-0.5, form.window, form.softcap, sinks)
    steps = SMOKE_STEPS if machine.smoke else STEPS
    try:
        for at in steps:
            worst = max(worst, _step_difference(machine, form, options, dtype, steps[at]))
        at = "a long chunk"
        worst = max(worst, _chunk_difference(machine, form, options, dtype, 40 if machine.smoke else LONG_CHUNK))
    except Exception as error:  # noqa: BLE001 - compilers and drivers may raise anything
        check.report.compared(PART, title, math.inf, ALLOWED[dtype], f"{at}: {reason_of(error)}")
        machine.wait()  # raises where the device is lost: then no later result would be valid
        return
    check.report.compared(PART, title, worst, ALLOWED[dtype])


@contextmanager
def plain_products() -> Iterator[None]:
    """torch's attention by the plain formula alone: its faster kernels may round float32 to less."""
    cuda: Any = torch.backends.cuda
    before = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
    _enable(False, False, False)
    try:
        yield
    finally:
        _enable(*before)


def _enable(flash: bool, efficient: bool, cudnn: bool) -> None:
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.backends.cuda.enable_mem_efficient_sdp(efficient)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


class _Inputs(NamedTuple):
    """One step of one layer in a dtype, with the cache that our attention writes to."""

    cache: KVCache
    chunks: list[ScheduledChunk]
    keys: torch.Tensor
    values: torch.Tensor
    query: torch.Tensor


def _inputs(machine: Machine, form: Form, dtype: torch.dtype, step: Step) -> _Inputs:
    torch.manual_seed(0)
    shape, device = form.shape, machine.device
    chunks = laid_out(step, BLOCK_SIZE)
    num_blocks = 1 + sum(len(chunk.sequence.blocks) for chunk in chunks)
    cache = KVCache([shape], num_blocks, BLOCK_SIZE, dtype=dtype, device=device, fp8=form.fp8)
    fill(cache)
    tokens = sum(chunk.num_tokens for chunk in chunks)
    keys = torch.randn(shape.heads, tokens, shape.key_size, device=device).to(dtype).transpose(0, 1)
    values = torch.randn(tokens, shape.heads, shape.value_size, device=device).to(dtype)
    keys[0, 0, 0], values[-1, -1, -1] = math.nan, -math.inf
    query = torch.randn(form.heads, tokens, shape.key_size, device=device).to(dtype).transpose(0, 1)
    return _Inputs(cache, chunks, keys, values, query)


@torch.inference_mode()
def _step_difference(machine: Machine, form: Form, options: AttentionOptions, dtype: torch.dtype, step: Step) -> float:
    """The difference to the reference backend in float32 on the same numbers."""
    ours = _inputs(machine, form, dtype, step)
    exact = KVCache(
        [form.shape], ours.cache.num_blocks, BLOCK_SIZE, dtype=torch.float32, device=machine.device, fp8=form.fp8
    )
    for mine, other in zip(stored(ours.cache), stored(exact), strict=True):
        other.copy_(mine)
    found = _attended(machine, ours, options)
    reference = ReferenceAttention(exact)
    reference.prepare(flatten(ours.chunks, BLOCK_SIZE))
    reference.write_kv(0, ours.keys.float(), ours.values.float())
    exact_sinks = None if options.sinks is None else options.sinks.float()
    expected = reference.attend(0, ours.query.float(), options._replace(sinks=exact_sinks))
    return max(
        difference(found, expected),
        *(difference(a.float(), b.float()) for a, b in zip(stored(ours.cache), stored(exact), strict=True)),
    )


def fill(cache: KVCache) -> None:
    """Random normal numbers in all blocks, with scales near 1 where they have scales."""
    for blocks in (*cache.keys, *cache.values):
        blocks.copy_(torch.randn(blocks.shape, device=blocks.device))
    for scales in (*cache.key_scales, *cache.value_scales):
        if scales is not None:
            scales.fill_(127)


def stored(cache: KVCache) -> list[torch.Tensor]:
    """Keys and values of the first layer, and their scales where they have any."""
    found = (cache.keys[0], cache.values[0], cache.key_scales[0], cache.value_scales[0])
    return [tensor for tensor in found if tensor is not None]


def _attended(machine: Machine, inputs: _Inputs, options: AttentionOptions) -> torch.Tensor:
    backend = machine.attention(inputs.cache)
    backend.prepare(flatten(inputs.chunks, BLOCK_SIZE))
    backend.write_kv(0, inputs.keys, inputs.values)
    return backend.attend(0, inputs.query, options).float()


@torch.inference_mode()
def _chunk_difference(
    machine: Machine, form: Form, options: AttentionOptions, dtype: torch.dtype, tokens: int
) -> float:
    """A prompt in one chunk, against the formula for some of its rows: all rows would exceed the memory of the card."""
    ours = _inputs(machine, form, dtype, ((0, tokens),))
    found = _attended(machine, ours, options)
    rows = torch.arange(tokens - 1, -1, -max(1, tokens // 64), device=machine.device)
    expected = _formula(ours, options, rows)
    return difference(found[rows], expected)


def _formula(inputs: _Inputs, options: AttentionOptions, rows: torch.Tensor) -> torch.Tensor:
    """softmax(q k) v in float32, [rows, heads, value size]."""
    clean = [x.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for x in (inputs.keys, inputs.values)]
    if inputs.cache.fp8:
        clean = [dequantise(*quantise(x), torch.float32) for x in clean]
    if inputs.cache.values_in_keys[0]:
        clean[1] = clean[0][..., : clean[1].shape[2]]
    group = inputs.query.shape[1] // clean[0].shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in clean)
    scores = torch.einsum("rhd,khd->hrk", inputs.query[rows].float(), keys) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    asked = torch.arange(len(keys), device=rows.device)
    seen = asked <= rows[:, None]
    if options.sliding_window is not None:
        seen &= asked > rows[:, None] - options.sliding_window
    scores = scores.masked_fill(~seen, -math.inf)
    if options.sinks is not None:
        sinks = options.sinks.float()[:, None, None].expand(-1, len(rows), 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return torch.einsum("hrk,khd->rhd", weights, values)


def laid_out(step: Step, block_size: int) -> list[ScheduledChunk]:
    """Chunks whose blocks are scattered over a pool that is one block larger than they need."""
    needed = [-(-(past + count) // block_size) for past, count in step]
    free = random.Random(0).sample(range(sum(needed) + 1), sum(needed) + 1)
    chunks = []
    for (past, count), blocks in zip(step, needed, strict=True):
        owned = array("i", [free.pop() for _ in range(blocks)])
        chunks.append(
            ScheduledChunk(Sequence(Request("check", (1,), GREEDY), 0, [1] * (past + count), blocks=owned), past, count)
        )
    return chunks


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest number; infinite where there is a NaN."""
    if found.shape != expected.shape or not found.isfinite().all():
        return math.inf
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9))

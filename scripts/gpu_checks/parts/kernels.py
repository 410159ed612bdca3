"""A table of the operations of a step, each alone: products, decode and prefill attention, and others' attention.

Each is recorded, so that its time includes no launches, over inputs that together exceed any cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.attention import step_index
from engine.attention.base import AttentionOptions
from engine.cache.kv_tensors import KVCache
from engine.scheduling.flat_batch import flatten
from gpu_checks import goals
from gpu_checks.check import Check
from gpu_checks.models import BLOCK_SIZE
from gpu_checks.parts.attention import FORMS, Form, Step, fill, fp8_is_lacking, laid_out
from gpu_checks.report import reason_of

PART = "kernels"
# Llama-3.1-8B: sizes of input and output of each fused product.
LINEARS = {"query, key, value": (4096, 6144), "out": (4096, 4096), "gate, up": (4096, 28672), "down": (14336, 4096)}
ROWS = (1, 4, 8, 64, 256)
# Keys that a program has at least where decodes are shared, beside our choice.
SHARES = (256, 512)
CONTEXT = 4096
DECODES: dict[str, Step] = {
    "1": ((CONTEXT, 1),),
    "1 × 1,024": ((1024, 1),),
    "8": ((CONTEXT, 1),) * 8,
    "64": ((CONTEXT, 1),) * 64,
    "256": ((CONTEXT, 1),) * 256,
    "1 × 32,768 + 63 × 200": ((32_768, 1), *((200, 1),) * 63),
}
SMOKE_DECODES: dict[str, Step] = {"64": ((20, 1),) * 2}
# Tokens before the chunk, and its own.
PREFILLS = ((0, 1024), (0, 4096), (0, 16_384), (15_360, 1024))
# Rows of a tile and keys per iteration.
PREFILL_TUNINGS = ((128, 128),)
# Inputs take turns; together they are this many times the device's cache.
_CACHES = 4
_MOST_TURNS = 64


@torch.inference_mode()
def run(check: Check) -> None:
    """Measure everything, the most important first."""
    if not check.has_time(PART, "everything"):
        return
    ceilings, report = check.ceilings, check.report
    sheet = goals.datasheet(check.machine.name)
    report.number(PART, "copy", ceilings.copy / 1e9, "GB/s", f"datasheet {sheet.gb_s:.0f}" if sheet else "")
    known = f"datasheet {sheet.tflops:.0f}" if sheet and sheet.tflops else ""
    report.number(PART, "product of 8,192 × 8,192", ceilings.matmul / 1e12, "TFLOP/s", known)
    if sheet:
        report.share(goals.COPY, ceilings.copy / (sheet.gb_s * 1e9))
    for number, step in (SMOKE_DECODES if check.machine.smoke else DECODES).items():
        _measure_decode(check, number, step)
    for past, tokens in ((5, 24),) if check.machine.smoke else PREFILLS:
        _measure_prefill(check, past, tokens)
    for name, (inputs, outputs) in LINEARS.items():
        _measure_linear(check, name, *((32, 48) if check.machine.smoke else (inputs, outputs)))
    _measure_small(check)
    check.machine.forget()


def _turns(check: Check, size: int) -> int:
    """How many inputs of ``size`` bytes take turns."""
    return max(1, min(_MOST_TURNS, -(-_CACHES * check.machine.cache_bytes // size)))


def _seconds(check: Check, works: list[Callable[[], object]]) -> float:
    """Seconds of one of ``works``, in a recording of all."""

    def compute() -> None:
        for work in works:
            work()

    replay = check.machine.recorded(compute)
    return check.machine.device_seconds(replay, 1 if check.machine.smoke else max(1, 32 // len(works))) / len(works)


def _attempt(
    check: Check, name: str, work: Callable[[], float], scale: float, unit: str, ours: bool = True
) -> float | None:
    """Measure one entry of the table; what cannot be computed is a line of it, and a failure only if it is ours."""
    try:
        seconds = work()
    except Exception as error:  # noqa: BLE001 - compilers and drivers may raise anything
        if ours:
            check.report.failed(PART, name, error)
        else:
            check.report.skipped(PART, name, reason_of(error))
        check.machine.wait()  # raises where the device is lost
        return None
    check.report.number(PART, name, scale / seconds, unit, f"{seconds * 1e6:.1f} µs")
    return seconds


def _measure_linear(check: Check, name: str, inputs: int, outputs: int) -> None:
    machine = check.machine
    size = inputs * outputs * machine.dtype.itemsize
    title = f"linear {inputs} → {outputs} ({name})"
    if not check.has_time(PART, title, 1.0):
        return
    weights = [machine.random(outputs, inputs) for _ in range(_turns(check, size))]
    for rows in ROWS:
        source = machine.random(rows, inputs)
        works: list[Callable[[], object]] = [partial(functional.linear, source, weight) for weight in weights]
        seconds = _attempt(check, f"{title}, {rows} rows", partial(_seconds, check, works), size / 1e9, "GB/s")
        if seconds and rows == 1 and name == "gate, up":
            check.report.share(goals.LINEAR, size / seconds / check.ceilings.copy)
    if missing := _missing(check, "triton"):
        check.report.skipped(PART, f"{title}, ours", missing)
        return
    from engine.fused.few_rows import ROWS as FEW_ROWS
    from engine.fused.few_rows import few_rows_linear

    for rows in FEW_ROWS[:1] if machine.smoke else FEW_ROWS:
        source = machine.random(rows, inputs)
        works = [partial(few_rows_linear, source, weight, None) for weight in weights]
        _attempt(check, f"{title}, {rows} rows, ours", partial(_seconds, check, works), size / 1e9, "GB/s")


def _measure_small(check: Check) -> None:
    """The kernels between the products of a layer, beside torch's own operators."""
    if missing := _missing(check, "triton"):
        check.report.skipped(PART, "kernels between products", missing)
        return
    from engine.fused.layers import add_norm
    from engine.fused.mlp import activated
    from engine.fused.ops import FusedNorm

    machine = check.machine
    width, middle = (32, 48) if machine.smoke else (4096, 14336)
    norm = FusedNorm(nn.RMSNorm(width, device=machine.device, dtype=machine.dtype), 1e-5, 0.0, True)

    def add_then_norm(hidden: torch.Tensor, delta: torch.Tensor) -> object:
        return norm(hidden + delta)

    def silu_then_times(gate: torch.Tensor, up: torch.Tensor) -> object:
        return functional.silu(gate) * up

    for rows in ROWS[:1] if machine.smoke else ROWS:
        title = f"{rows} rows of {width}"
        if not check.has_time(PART, title, 0.5):
            return
        hidden, delta, both = (machine.random(1, rows, size) for size in (width, width, 2 * middle))
        gate, up = both.chunk(2, dim=-1)
        ways: dict[str, Callable[[], object]] = {
            f"add and norm, {title}": partial(add_norm, hidden, delta, norm),
            f"add, then norm, {title}": partial(add_then_norm, hidden, delta),
            f"silu · up, {rows} rows of {middle}": partial(activated, gate, up, "silu"),
            f"silu, then · up, {rows} rows of {middle}": partial(silu_then_times, gate, up),
        }
        for way, work in ways.items():
            _attempt(check, way, partial(_seconds, check, [work] * (1 if machine.smoke else 32)), rows / 1e6, "rows/µs")


def _measure_decode(check: Check, number: str, step: Step) -> None:
    form = FORMS["no power of two" if check.machine.smoke else "llama"]
    best = 0.0
    for share in (step_index.MIN_SHARE, *SHARES):
        how = "as it is" if share == step_index.MIN_SHARE else f"shares of at least {share} keys"
        title = f"decode attention, {number} sequences, {how}"
        if not check.has_time(PART, title, 1.0):
            return
        size = sum(past + now for past, now in step) * form.shape.heads * (form.shape.key_size + form.shape.value_size)
        size *= check.machine.dtype.itemsize
        measure = partial(_decode_seconds, check, form, step, share, _turns(check, size))
        seconds = _attempt(check, title, measure, size / 1e9, "GB/s")
        if seconds and share == step_index.MIN_SHARE:
            best = size / seconds / check.ceilings.copy
    if number == "64" and best:
        check.report.share(goals.ATTEND_DECODE, best, "as it is")
    title = f"decode attention, {number} sequences, fp8"
    if lacking := fp8_is_lacking(check.machine):
        check.report.skipped(PART, title, lacking)
    elif check.has_time(PART, title, 1.0):
        shape = form.shape
        size = sum(past + now for past, now in step) * shape.heads * (shape.key_size + shape.value_size + 2)
        shares = step_index.MIN_SHARE, _turns(check, size)
        measure = partial(_decode_seconds, check, form._replace(fp8=True), step, *shares)
        seconds = _attempt(check, title, measure, size / 1e9, "GB/s")
        if seconds:
            share_of_copy = size / seconds / check.ceilings.copy
            check.report.number(PART, f"{title}, share of the copy", share_of_copy, "", f"{seconds * 1e3:.3f} ms")
    check.machine.forget()


def _decode_seconds(check: Check, form: Form, step: Step, share: int, layers: int) -> float:
    machine, options = check.machine, AttentionOptions(form.shape.key_size**-0.5)
    works = laid_out(step, BLOCK_SIZE)
    blocks = 1 + sum(len(work.sequence.blocks) for work in works)
    shapes = [form.shape] * layers
    cache = KVCache(shapes, blocks, BLOCK_SIZE, dtype=machine.dtype, device=machine.device, fp8=form.fp8)
    fill(cache)
    backend, chosen = machine.attention(cache), step_index.MIN_SHARE
    step_index.MIN_SHARE = share
    try:
        backend.prepare(flatten(works, BLOCK_SIZE))
    finally:
        step_index.MIN_SHARE = chosen
    query = machine.random(len(step), form.heads, form.shape.key_size)
    return _seconds(check, [partial(backend.attend, layer, query, options) for layer in range(layers)])


@contextmanager
def tuned(rows: int | None, keys: int | None) -> Iterator[None]:
    """Within the block prefill attention has tiles of ``rows`` and ``keys`` instead of its own choice."""
    if keys is None:
        yield
        return
    from engine.attention import triton_launch

    chosen = triton_launch.prefill_options
    triton_launch.prefill_options = partial(chosen, rows=rows, keys=keys)
    try:
        yield
    finally:
        triton_launch.prefill_options = chosen


class _Prompt(NamedTuple):
    """One prompt in one layer: [tokens, heads, size], with as many key and value heads as query heads."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def _measure_prefill(check: Check, past: int, tokens: int) -> None:
    form, machine = FORMS["no power of two" if check.machine.smoke else "llama"], check.machine
    operations = 4 * form.heads * form.shape.key_size * (tokens * past + tokens * (tokens + 1) // 2)
    prompt = _Prompt(*(machine.random(tokens, form.heads, form.shape.key_size) for _ in range(3)))
    ways: dict[str, Callable[[], float]] = {"ours": partial(_our_prefill_seconds, check, form, past, tokens)}
    for rows, keys in () if machine.smoke else PREFILL_TUNINGS:
        ways[f"ours, {rows} rows, {keys} keys"] = partial(_our_prefill_seconds, check, form, past, tokens, rows, keys)
    for name, backend in {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}.items():
        ways[f"{name} SDPA"] = partial(_sdpa_seconds, check, prompt, backend)
    ways["torch varlen"] = partial(_varlen_seconds, check, prompt)
    ways["FlashInfer"] = partial(_flashinfer_seconds, check, prompt)
    for way, measure in ways.items():
        if past and not way.startswith("ours"):
            continue  # the others' inputs have no past
        title = f"prefill attention, {tokens} tokens{f' after {past:,}' if past else ''}, {way}"
        if not check.has_time(PART, title, 1.0):
            return
        if missing := _missing(check, way):
            check.report.skipped(PART, title, missing)
            continue
        seconds = _attempt(check, title, measure, operations / 1e12, "TFLOP/s", ours=way == "ours")
        if seconds and way == "ours" and (past, tokens) == (0, 4096):
            check.report.share(goals.ATTEND_PREFILL, operations / seconds / check.ceilings.matmul)


def _missing(check: Check, way: str) -> str:
    """Why another library is not available here; "" if it is."""
    modules = {"torch varlen": "torch.nn.attention.varlen", "FlashInfer": "flashinfer", "triton": "triton"}
    module = modules.get(way)
    if module is not None:
        try:
            __import__(module)
        except ImportError as error:
            return f"not installed: {error}"
    if check.machine.smoke and way != "flash SDPA":
        return "" if way.startswith(("ours", "triton")) else "for GPUs only"
    return ""


def _our_prefill_seconds(
    check: Check, form: Form, past: int, tokens: int, rows: int | None = None, keys: int | None = None
) -> float:
    machine = check.machine
    (work,) = laid_out(((past, tokens),), BLOCK_SIZE)
    cache = KVCache([form.shape], 1 + len(work.sequence.blocks), BLOCK_SIZE, dtype=machine.dtype, device=machine.device)
    for numbers in (*cache.keys, *cache.values):
        numbers.normal_()
    backend = machine.attention(cache)
    backend.prepare(flatten([work], BLOCK_SIZE))
    query = machine.random(tokens, form.heads, form.shape.key_size)
    attend = partial(backend.attend, 0, query, AttentionOptions(form.shape.key_size**-0.5))
    with tuned(rows, keys):
        return _seconds(check, [attend])


def _sdpa_seconds(check: Check, prompt: _Prompt, backend: SDPBackend) -> float:
    query, keys, values = (x.transpose(0, 1)[None] for x in prompt)
    with sdpa_kernel(backend):
        attend = partial(functional.scaled_dot_product_attention, query, keys, values, is_causal=True)
        return _seconds(check, [attend])


def _varlen_seconds(check: Check, prompt: _Prompt) -> float:
    from torch.nn.attention.varlen import varlen_attn

    tokens = len(prompt.query)
    ends = torch.tensor([0, tokens], dtype=torch.int32, device=check.machine.device)
    # The parameter for causality differs between releases.
    windows = "window_size" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if windows else {"is_causal": True}
    return _seconds(check, [partial(varlen_attn, *prompt, ends, ends, tokens, tokens, **causal)])


def _flashinfer_seconds(check: Check, prompt: _Prompt) -> float:
    import flashinfer

    attend = partial(flashinfer.single_prefill_with_kv_cache, *prompt, causal=True)
    return check.machine.device_seconds(attend, 16)  # not recorded: it may do what a recording does not allow

"""Compiles our kernels on all cores before anything waits for one of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from engine.attention.base import AttentionOptions
from engine.cache.kv_tensors import KVCache
from engine.cache.layout import KVShape
from engine.scheduling.flat_batch import flatten
from gpu_checks.machine import Machine
from gpu_checks.models import BLOCK_SIZE, loaded, random_module, shape_of
from gpu_checks.parts.attention import FORMS, Form, fp8_is_lacking, laid_out
from gpu_checks.parts.kernels import PREFILL_TUNINGS, tuned
from gpu_checks.parts.packed import launches

Plan = Callable[[], object]


def compile_ahead(plans: Iterable[Plan]) -> str:
    """Compile every kernel that ``plans`` would launch, without launching any; returns what prevented it, if anything.

    A kernel that cannot be compiled is not an error here: it will fail where it is used, and be reported there.
    """
    failures = 0
    with torch.inference_mode(), _only_compiling() as obstacle:
        if not obstacle:
            for plan in plans:
                try:
                    plan()
                except Exception:  # noqa: BLE001 - compilers may raise anything, and see above
                    failures += 1
    return obstacle or (f"{failures} kernels could not be prepared" if failures else "")


def plans_of(machine: Machine, parts: Iterable[str]) -> Iterator[Plan]:
    """The launches of the kernels of these parts."""
    parts = set(parts)
    if "correctness" in parts:
        lacking = fp8_is_lacking(machine)
        for form in [form for form in FORMS.values() if not (form.fp8 and lacking)]:
            for dtype in (torch.float32, torch.bfloat16):
                yield partial(_attention, machine, form, dtype)
    if "packed" in parts:
        yield from launches(machine)
    names = ["Llama-3.1-8B"] if parts & {"kernels", "decode", "core"} else []
    names += ["Qwen3-0.6B"] if parts & {"correctness", "core"} else []
    for name in names:
        yield partial(_model, machine, name)
    if "kernels" in parts:
        for rows, keys in PREFILL_TUNINGS:
            yield partial(_tuned_attention, machine, rows, keys)
        if not fp8_is_lacking(machine):
            yield partial(_attention, machine, FORMS["llama with fp8"], machine.dtype)


@contextmanager
def _only_compiling() -> Iterator[str]:
    """Within the block kernels are compiled instead of launched, by as many threads as there are cores.

    Yields the reason where that is impossible.
    """
    try:
        from triton import JITFunction
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError as error:
        yield f"kernels are compiled one by one, when they are first used: {error}"
        return
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield "interpreted kernels are not compiled"
        return
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        del warmup
        return run(self, *args, grid=grid, warmup=True, **options)

    logging.disable(logging.WARNING)  # the engine's self-checks compare buffers that no kernel wrote
    JITFunction.run = compile_only
    try:
        with ThreadPoolExecutor(os.cpu_count()) as threads, AsyncCompileMode(threads, ignore_errors=True):
            yield ""
    finally:
        JITFunction.run = run
        logging.disable(logging.NOTSET)


def _attention(machine: Machine, form: Form, dtype: torch.dtype) -> None:
    """Each kernel of a layer."""
    sinks = torch.zeros(form.heads, device=machine.device, dtype=dtype) if form.has_sinks else None
    options = AttentionOptions(form.shape.key_size**-0.5, form.window, form.softcap, sinks)
    _launch(machine, form.heads, form.shape, options, dtype, fp8=form.fp8)


def _tuned_attention(machine: Machine, rows: int, keys: int) -> None:
    with tuned(rows, keys):
        _attention(machine, FORMS["llama"], machine.dtype)


def _model(machine: Machine, name: str) -> None:
    """The kernels of a model's layers, from one of its layers.

    What needs another rewrite before is launched here, because nothing is swapped where nothing is computed; nor is
    there anything to time.
    """
    from engine.fused.few_rows import ROWS, SpeedFewRows, few_rows_linear
    from engine.fused.layers import add_norm
    from engine.fused.ops import FuseNorms, rotated
    from engine.fused.rewrites import FUSED_OPS
    from engine.model.rewrites import apply_rewrites

    family, config = shape_of(machine, name)
    config = {**config, "vocab_size": 512, "num_hidden_layers": 1}
    model = loaded(random_module(family, machine.dtype, machine.device, **config))
    (layer,), heads = model.probe.layers, model.module.config.num_attention_heads
    norms, zeros = FuseNorms(), partial(torch.zeros, dtype=machine.dtype, device=machine.device)
    for place in norms.find(model):
        for norm in norms.stand_ins(place):
            if place.name == "norm":
                hidden = zeros(1, 1, model.module.config.hidden_size)
                add_norm(hidden, hidden, norm)
            elif place.name == "q_norm":
                size = layer.shape.key_size
                angles = zeros(1, 1, size)
                rotated(zeros(1, heads, 1, size), zeros(1, layer.shape.heads, 1, size), angles, angles, (norm, norm))
    for part in model.module.modules():
        for rows in ROWS if isinstance(part, nn.Linear) else ():
            few_rows_linear(zeros(rows, part.in_features), part.weight, part.bias)
    apply_rewrites(model, [rewrite for rewrite in FUSED_OPS if not isinstance(rewrite, SpeedFewRows)])
    _launch(machine, heads, layer.shape, AttentionOptions(layer.shape.key_size**-0.5), machine.dtype)


def _launch(
    machine: Machine, heads: int, shape: KVShape, options: AttentionOptions, dtype: torch.dtype, *, fp8: bool = False
) -> None:
    chunks = laid_out(((20, 1), (0, 100)), BLOCK_SIZE)
    blocks = 1 + sum(len(chunk.sequence.blocks) for chunk in chunks)
    cache = KVCache([shape], blocks, BLOCK_SIZE, dtype=dtype, device=machine.device, fp8=fp8)
    backend = machine.attention(cache)
    backend.prepare(flatten(chunks, BLOCK_SIZE))
    sizes = (shape.heads, shape.key_size), (shape.heads, shape.value_size), (heads, shape.key_size)
    keys, values, query = (torch.zeros(101, *size, dtype=dtype, device=machine.device) for size in sizes)
    backend.write_kv(0, keys, values)
    backend.attend(0, query, options)

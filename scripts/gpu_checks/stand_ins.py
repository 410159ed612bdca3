"""What a smoke run on a CPU uses in place of a GPU: Triton's interpreter, and computing instead of replaying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from engine.attention.gather import ReferenceAttention
from engine.runner.memory_profile import Attention


def record(compute: Callable[[], None]) -> Callable[[], None]:
    """Replaces a recording: computes each time."""
    compute()
    return compute


def attention() -> Attention:
    """Our kernels, interpreted; the reference where Triton is missing."""
    try:
        from engine.attention.triton_paged import TritonAttention
    except ImportError:
        return ReferenceAttention
    mend_interpreter()
    return TritonAttention


def mend_interpreter() -> None:
    """Have Triton's interpreter count its loops with numpy 2.4 and later, compute as a GPU does, and be quicker.

    The interpreter keeps scalars as arrays of one element, and up to Triton 3.6 converts them to loop bounds by
    ``int(array)``, which numpy 2.4 refuses: "only 0-dimensional arrays can be converted to Python scalars". And it
    patches the language anew whenever a kernel calls a function, which takes a third of the time: once in each run of a
    kernel is enough for the functions of a module.
    """
    from triton.runtime import interpreter

    _mend_numbers(interpreter)
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)

        def index(scalar: Any) -> int:
            return int(scalar.handle.data.item())

        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patched

    run, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    known: set[int] = set()

    def run_anew(*given: Any, **more: Any) -> Any:
        known.clear()
        return run(*given, **more)

    def patch_once(function: Any) -> Any:
        if id(function.__globals__) in known:
            return None  # a function of the kernel, which restores nothing
        known.add(id(function.__globals__))
        return patch(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = run_anew, patch_once


def _mend_numbers(interpreter: Any) -> None:
    """Round to e4m3 and bfloat16 as a GPU does, and multiply bfloat16.

    The interpreter rounds halves up, without a carry into the exponent, and cuts off what is subnormal in e4m3; it cuts
    off what bfloat16 has no room for; and in products it takes bfloat16 for integers.
    """
    import numpy as np
    from triton.language import bfloat16, float8e4nv, float32

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    # Of what is not negative and no NaN, in order.
    codes_to_numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()

    def converted(numbers: Any, source: Any, target: Any, rounding: Any) -> Any:
        # By numpy alone: tests forbid torch what a recording forbids, and the kernel calls nothing of torch on a GPU.
        if (source, target) == (float32, bfloat16):
            bits = numbers.view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return np.where(np.isnan(numbers), (bits >> 16) | 0x40, rounded).astype(np.uint16)
        if (source, target) != (float32, float8e4nv):
            return convert(numbers, source, target, rounding)
        exponents = np.frexp(numbers)[1] - 1
        units = np.exp2(np.maximum(exponents, -6) - 3).astype(np.float32)
        codes = np.searchsorted(codes_to_numbers, np.abs(np.rint(numbers / units) * units))
        return (codes + 128 * np.signbit(numbers)).astype(np.uint8)

    def multiplied(builder: Any, one: Any, other: Any, *more: Any) -> Any:
        wide = [
            builder.cast_impl(given, float32) if given.dtype.scalar == bfloat16 else given for given in (one, other)
        ]
        return dot(builder, *wide, *more)

    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = converted, multiplied

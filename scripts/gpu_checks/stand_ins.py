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
    """Have Triton's interpreter count its loops with numpy 2.4 and later, round to e4m3 as a GPU does, and be quicker.

    The interpreter keeps scalars as arrays of one element, and up to Triton 3.6 converts them to loop bounds by
    ``int(array)``, which numpy 2.4 refuses: "only 0-dimensional arrays can be converted to Python scalars". It rounds
    halves up, without a carry into the exponent, and cuts off what is subnormal in e4m3. And it patches the language
    anew whenever a kernel calls a function, which takes a third of the time: once in each run of a kernel is enough for
    the functions of a module.
    """
    import numpy as np
    from triton.language import float8e4nv, float32
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    # Of what is not negative and no NaN, in order.
    codes_to_numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()

    def converted(numbers: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (float32, float8e4nv):
            return convert(numbers, source, target, rounding)
        # By numpy alone: tests forbid torch what a recording forbids, and the kernel calls nothing of torch on a GPU.
        exponents = np.frexp(numbers)[1] - 1
        units = np.exp2(np.maximum(exponents, -6) - 3).astype(np.float32)
        codes = np.searchsorted(codes_to_numbers, np.abs(np.rint(numbers / units) * units))
        return (codes + 128 * np.signbit(numbers)).astype(np.uint8)

    interpreter._convert_float = converted
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

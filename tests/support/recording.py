"""Finds out on a CPU what would wait for a GPU, and what CUDA could not record.

``record`` stands in for CUDA's recorder: what it replays is computed again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from engine.attention.gather import ReferenceAttention
from engine.scheduling.flat_batch import FlatBatch, StepShape

# Operators that read numbers of the device on the host, or whose result is as large as those numbers say.
READING = {
    "item", "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere",
    "masked_select", "unique2", "_unique2", "unique_dim", "unique_consecutive", "bincount",
}  # fmt: skip
# How Python objects become tensors: an upload from memory that is not pinned.
BRINGING = {"lift_fresh", "lift_fresh_copy", "_pin_memory"}
# Methods that hand numbers to Python. On a CPU some of them run no operator.
METHODS = {
    "tolist", "numpy", "cpu", "item", "pin_memory", "__bool__", "__int__", "__float__", "__index__", "__array__",
    "__contains__",
}  # fmt: skip


class ForbiddenError(RuntimeError):
    """A computation waits for the device, or does what a capture forbids."""


class _Operators(TorchDispatchMode):  # type: ignore[misc]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        given = [*args, *kwargs.values()]
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        sized = name == "repeat_interleave" and args[-1] is tensors[-1] and kwargs.get("output_size") is None
        if name in READING or sized or (name == "where" and len(given) == 1):
            raise ForbiddenError(f"{name} waits for the device")
        if name in BRINGING:
            raise ForbiddenError(f"{name} brings numbers from the host")
        if name in ("copy_", "_to_copy", "to"):
            devices = {value for value in given if isinstance(value, torch.device)}
            if len(devices | {tensor.device for tensor in tensors}) > 1:
                raise ForbiddenError(f"{name} copies between host and device")
        if "index" in name and len(args) > 1 and isinstance(args[1], list | tuple):
            indices = [index for index in args[1] if isinstance(index, torch.Tensor)]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                raise ForbiddenError(f"{name} by a mask waits for the device")
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in METHODS and "Tensor" in getattr(func, "__qualname__", ""):
            raise ForbiddenError(f"Tensor.{name} waits for the device")
        return func(*args, **(kwargs or {}))


def _refuse(*_given: Any, **_more: Any) -> None:
    raise ForbiddenError("numbers are brought from the host")


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Within it, ``ForbiddenError`` is raised for all that waits for a device or copies between it and the host, except
    for uploads from pinned memory.

    Triton's interpreter is exempt: how it computes a kernel is not what the device would do.
    """
    with ExitStack() as stack:
        if (interpreter := sys.modules.get("triton.runtime.interpreter")) is not None:
            run = interpreter.GridExecutor.__call__

            def unobserved(*given: Any, **more: Any) -> Any:
                with _disable_current_modes(), torch._C.DisableTorchFunction():
                    return run(*given, **more)

            stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", unobserved))
        stack.enter_context(_Methods())
        stack.enter_context(_Operators())
        yield


@contextmanager
def capture_rules() -> Iterator[None]:
    """``nothing_waits``, and nothing brings numbers from the host either."""
    with ExitStack() as stack:
        for name in ("frombuffer", "from_numpy"):
            stack.enter_context(mock.patch.object(torch, name, _refuse))
        stack.enter_context(nothing_waits())
        yield


def record(compute: Callable[[], None]) -> Callable[[], None]:
    """A ``Recorder``: computes under ``capture_rules``, at once and at each replay."""

    def replay() -> None:
        with capture_rules():
            compute()

    replay()
    return replay


class GraphGather(ReferenceAttention):
    """``GraphAttention`` by gathering: ``fill`` prepares, and what is "replayed" reads what it prepared."""

    def reserve(self, shapes: list[StepShape], max_sequences: int, max_blocks: int) -> None:
        self.reserved = shapes, max_sequences, max_blocks

    def capture(self, shape: StepShape) -> None:
        assert shape == self._filled, "a step of another shape was filled in"

    def fill(self, batch: FlatBatch, shape: StepShape) -> None:
        assert len(batch.tokens) == shape.tokens
        self._filled = shape
        self.prepare(batch)
        for group, blocks in enumerate(batch.groups):
            self._calls_of(group, blocks.window)

"""What a recording of device work forbids, found out on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# They read a number on the host, have a size that depends on numbers, or bring numbers from the host.
FORBIDDEN = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "lift_fresh",
    "lift_fresh_copy",
    "_pin_memory",
}


class NothingThatWaits(TorchDispatchMode):
    """Raises ``RuntimeError`` at an operator that a capture forbids, as CUDA does; counts those that it lets pass."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.partition(".")[0]
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        indices = [i for value in args if isinstance(value, list | tuple) for i in value if isinstance(i, torch.Tensor)]
        by_mask = name.startswith("index") and any(i.dtype in (torch.bool, torch.uint8) for i in indices)
        # Without a size, the result of repeat_interleave depends on the numbers.
        by_counts = name == "repeat_interleave" and kwargs.get("output_size") is None and len(tensors) == 1
        if name in FORBIDDEN or by_mask or by_counts or len({tensor.device for tensor in tensors}) > 1:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        self.operators += 1
        return func(*args, **kwargs)


def recorded(compute: Callable[[], None]) -> Callable[[], None]:
    """A ``Recorder`` without a GPU: what it returns computes again. Raises where a capture would."""

    def replay() -> None:
        with NothingThatWaits():
            compute()

    replay()
    return replay

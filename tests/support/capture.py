"""What a recording of device work forbids, found out on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# They read numbers on the host, have a size that depends on numbers, or bring numbers from the host.
FORBIDDEN = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "allclose",
    "nonzero",
    "nonzero_numpy",
    "argwhere",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "lift_fresh",
    "lift_fresh_copy",
    "pin_memory",
    "_pin_memory",
}


class NothingThatWaits(TorchDispatchMode):
    """Raises ``RuntimeError`` where a capture of a CUDA graph would; counts the operators that it lets pass."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        # It reads memory without an operator.
        self._tolist = patch.object(torch.Tensor, "tolist", self._refuse)

    def __enter__(self) -> NothingThatWaits:
        self._tolist.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._tolist.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.partition(".")[0]
        values = [*args, *kwargs.values()]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        indices = [i for value in args if isinstance(value, list | tuple) for i in value if isinstance(i, torch.Tensor)]
        by_mask = name.startswith("index") and any(i.dtype in (torch.bool, torch.uint8) for i in indices)
        # Without a size, that of the result depends on the numbers.
        by_counts = "repeat_interleave" in str(func) and "Tensor" in str(func) and kwargs.get("output_size") is None
        if name in FORBIDDEN or by_mask or by_counts or len({tensor.device for tensor in tensors}) > 1:
            self._refuse(func)
        self.operators += 1
        return func(*args, **kwargs)

    def _refuse(self, what: object = "tolist") -> Any:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


def recorded(compute: Callable[[], None]) -> Callable[[], None]:
    """A ``Recorder`` without a GPU: what it returns computes again. Raises where a capture would."""

    def replay() -> None:
        with NothingThatWaits():
            compute()

    replay()
    return replay

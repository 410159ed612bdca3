"""Finds out on a CPU what would wait for a GPU: work that a launch must not do, though it need not be recorded.

``support.recording`` has the rules of a recording, which may not bring numbers from the host either.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# They read numbers on the host, have a size that depends on numbers, or bring numbers from memory that is not pinned.
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
    """Raises ``RuntimeError`` at what would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
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
        return func(*args, **kwargs)

    def _refuse(self, what: object = "tolist") -> Any:
        raise RuntimeError(f"called a synchronizing operation: {what}")

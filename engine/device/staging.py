"""Integers on their way to the device: one asynchronous copy from pinned memory for each step."""

from __future__ import annotations

from array import array

import torch


class StagedNumbers:
    """Up to ``capacity`` integers (int32) at a fixed place on the device, and the memory from which they come."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.numbers = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._staging = torch.zeros(capacity, dtype=torch.int32, pin_memory=self._on_gpu)
        self._copied = torch.cuda.Event() if self._on_gpu else None

    def upload(self, numbers: array[int]) -> None:
        """Replace the first ``len(numbers)`` integers; does not wait for the device, except for the last upload."""
        if self._copied is not None:
            self._copied.synchronize()
        count = len(numbers)
        self._staging[:count] = torch.frombuffer(numbers, dtype=torch.int32)
        self.numbers[:count].copy_(self._staging[:count], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

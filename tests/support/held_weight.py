"""A weight of a checkpoint, as packed modules are given it."""

from __future__ import annotations

import torch

from engine.packed.schemes import Blocks


class HeldWeight:
    """A weight that is these blocks."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    def blocks(self) -> Blocks:
        return self._blocks

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        return self._blocks.unpacked(dtype)

    def shape(self) -> torch.Size:
        return self._blocks.shape

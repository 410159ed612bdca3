"""Keys and values of all layers: the tensors of the paged cache."""

from __future__ import annotations

import math
import mmap

import torch

from engine.cache.layout import KVShape, num_groups


class KVCache:
    """Keys and values of every layer: [blocks, block size, kv heads, size] each, zero at first.

    Which block belongs to whom is the block pool's business. ``groups`` are the layers' groups.
    """

    def __init__(
        self, shapes: list[KVShape], num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self.groups = [shape.group for shape in shapes]
        self.num_groups = num_groups(shapes)
        self.keys = [self._blocks(shape.heads, shape.key_size) for shape in shapes]
        self.values = [self._blocks(shape.heads, shape.value_size) for shape in shapes]

    def _blocks(self, heads: int, size: int) -> torch.Tensor:
        shape = (self.num_blocks, self.block_size, heads, size)
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        # Memory that the system hands out zeroed when it is first written: a start does not wait for
        # gigabytes to be cleared, and a cache that stays half empty takes half.
        lazy = mmap.mmap(-1, math.prod(shape) * self.dtype.itemsize, access=mmap.ACCESS_COPY)
        return torch.frombuffer(lazy, dtype=self.dtype).view(shape)

"""Keys and values of all layers: the tensors of the paged cache."""

from __future__ import annotations

import math
import mmap

import torch

from engine.cache.layout import KVShape, num_groups


class KVCache:
    """Keys and values of every layer: [blocks, block size, kv heads, size] each, zero at first.

    Which block belongs to whom is the block pool's business. ``groups`` are the layers' groups. ``dtype`` is the type
    that attention computes in, and that of the blocks. With ``fp8`` these are float8_e4m3fn instead, and ``key_scales``
    and ``value_scales``, [blocks, block size, kv heads] uint8, hold their scales (``engine.cache.fp8``). Where values
    lie in the keys, the tensors of the values are views of theirs: [..., :value size], with their scales.
    """

    def __init__(
        self,
        shapes: list[KVShape],
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        fp8: bool = False,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self.fp8 = fp8
        self.groups = [shape.group for shape in shapes]
        self.num_groups = num_groups(shapes)
        stored = torch.float8_e4m3fn if fp8 else dtype
        self.values_in_keys = [shape.values_in_keys for shape in shapes]
        self.keys = [self._blocks(stored, shape.heads, shape.key_size) for shape in shapes]
        self.values = [
            keys[..., : shape.value_size]
            if shape.values_in_keys
            else self._blocks(stored, shape.heads, shape.value_size)
            for shape, keys in zip(shapes, self.keys, strict=True)
        ]
        self.key_scales = [self._blocks(torch.uint8, shape.heads) if fp8 else None for shape in shapes]
        self.value_scales = [
            scales if shape.values_in_keys or scales is None else self._blocks(torch.uint8, shape.heads)
            for shape, scales in zip(shapes, self.key_scales, strict=True)
        ]

    def _blocks(self, dtype: torch.dtype, *sizes: int) -> torch.Tensor:
        shape = (self.num_blocks, self.block_size, *sizes)
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=self.device)
        # Memory that the system hands out zeroed when it is first written: a start does not wait for
        # gigabytes to be cleared, and a cache that stays half empty takes half.
        lazy = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, access=mmap.ACCESS_COPY)
        return torch.frombuffer(lazy, dtype=dtype).view(shape)

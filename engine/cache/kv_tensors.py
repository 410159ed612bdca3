"""Keys and values of all layers: the tensors of the paged cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from engine.cache.layout import KVShape, num_groups
from engine.cache.lazy_memory import zeroed


class KVCache:
    """Keys and values of every layer: [blocks, block size, kv heads, size] each, zero at first.

    ``num_blocks`` are those of each layer group, or one number for all. Which block belongs to whom is the block pools'
    business. ``groups`` are the layers' groups. ``dtype`` is the type
    that attention computes in, and that of the blocks. With ``fp8`` these are float8_e4m3fn instead, and ``key_scales``
    and ``value_scales``, [blocks, block size, kv heads] uint8, hold their scales (``engine.cache.fp8``). Where values
    lie in the keys, the tensors of the values are views of theirs: [..., :value size], with their scales.
    """

    def __init__(
        self,
        shapes: list[KVShape],
        num_blocks: int | Sequence[int],
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        fp8: bool = False,
    ) -> None:
        self.num_groups = num_groups(shapes)
        self.num_blocks = (num_blocks,) * self.num_groups if isinstance(num_blocks, int) else tuple(num_blocks)
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self.fp8 = fp8
        self.groups = [shape.group for shape in shapes]
        stored = torch.float8_e4m3fn if fp8 else dtype
        self.values_in_keys = [shape.values_in_keys for shape in shapes]
        self.keys = [self._blocks(shape, stored, shape.key_size) for shape in shapes]
        self.values = [
            keys[..., : shape.value_size] if shape.values_in_keys else self._blocks(shape, stored, shape.value_size)
            for shape, keys in zip(shapes, self.keys, strict=True)
        ]
        self.key_scales = [self._blocks(shape, torch.uint8) if fp8 else None for shape in shapes]
        self.value_scales = [
            scales if shape.values_in_keys or scales is None else self._blocks(shape, torch.uint8)
            for shape, scales in zip(shapes, self.key_scales, strict=True)
        ]

    def _blocks(self, layer: KVShape, dtype: torch.dtype, *sizes: int) -> torch.Tensor:
        shape = (self.num_blocks[layer.group], self.block_size, layer.heads, *sizes)
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=self.device)
        return torch.frombuffer(zeroed(math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)

"""The memory of the paged cache: how much one page takes, how many pages fit, and the tensors themselves."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.machine_memory import available_bytes
from engine.types import ModelRefused

GPU_SHARE = 0.92
GPU_RUNNING = 256  # a step of 64 decodes reads the weights for little more than half of the tokens that it could
CPU_LIMIT_BYTES = 2 << 30
CPU_SHARE = 0.25
CPU_RUNNING = 64


class KVShape(NamedTuple):
    """What one token leaves behind in one layer: ``heads`` keys of ``key_size`` and values of ``value_size``."""

    heads: int
    key_size: int
    value_size: int


@dataclass(frozen=True, slots=True)
class KVPlan:
    """How many pages to make and the longest sequence that they are guaranteed to hold, in tokens."""

    num_blocks: int
    max_context: int


class KVCache:
    """Keys and values of every layer: [blocks, block size, kv heads, size] each, zero at first.

    Which page belongs to whom is the block pool's business.
    """

    def __init__(
        self, shapes: list[KVShape], num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self.keys = [self._pages(shape.heads, shape.key_size) for shape in shapes]
        self.values = [self._pages(shape.heads, shape.value_size) for shape in shapes]

    def _pages(self, heads: int, size: int) -> torch.Tensor:
        shape = (self.num_blocks, self.block_size, heads, size)
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        # Memory that the system hands out zeroed, page by page when first written: a start does not wait for
        # gigabytes to be cleared, and a cache that stays half empty takes half.
        lazy = mmap.mmap(-1, math.prod(shape) * self.dtype.itemsize, access=mmap.ACCESS_COPY)
        return torch.frombuffer(lazy, dtype=self.dtype).view(shape)


def block_bytes(shapes: list[KVShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one page takes over all layers."""
    numbers_per_token = sum(shape.heads * (shape.key_size + shape.value_size) for shape in shapes)
    return block_size * numbers_per_token * int(dtype.itemsize)


def memory_budget(kv_memory: float | None, device: torch.device, reserved: int = 0) -> int:
    """Bytes for the cache: ``kv_memory`` itself where it exceeds 1, else that share of what is free and not reserved.

    Default: 0.92 of the free GPU memory, which the largest steps have left; on a CPU a quarter of the free memory and
    2 GiB at most. The other three quarters are for packing the weights, which are loaded by then, for steps, for what
    the allocator holds back, and for the front end and further models under the same limit. Raises ``ModelRefused`` for
    more bytes than a GPU has left; a CPU takes only what is written.
    """
    if kv_memory is not None and kv_memory <= 0:
        raise ModelRefused(f"kv_memory is {kv_memory}; give a share above 0 and up to 1, or bytes")
    free = max(0, free_bytes(device) - reserved)
    if kv_memory is not None and kv_memory > 1:
        if device.type == "cuda" and kv_memory > free:
            raise ModelRefused(
                f"kv_memory is {int(kv_memory)} bytes, but {free} are free on {device} beside the weights and "
                f"{reserved} for steps; lower it, or give a share above 0 and up to 1"
            )
        return int(kv_memory)
    if kv_memory is not None:
        return int(free * kv_memory)
    return int(free * GPU_SHARE) if device.type == "cuda" else min(CPU_LIMIT_BYTES, int(free * CPU_SHARE))


def running_limit(max_running: int | None, device: torch.device) -> int:
    """How many sequences run at once: ``max_running``, or by default as many as keep the device busy."""
    return max_running or (GPU_RUNNING if device.type == "cuda" else CPU_RUNNING)


def plan_blocks(budget: int, bytes_per_block: int, block_size: int, max_context: int, max_running: int) -> KVPlan:
    """As many pages as fit into ``budget`` bytes, but no more than ``max_running`` full sequences can use.

    A budget below one sequence of ``max_context`` tokens shortens the context to what fits. Raises ``ModelRefused``
    where not even one page does.
    """
    fitting = budget // bytes_per_block
    if fitting < 1:
        raise ModelRefused(
            f"the KV cache may take {budget} bytes, but one block of {block_size} tokens takes {bytes_per_block}; "
            "raise kv_memory or free memory"
        )
    per_sequence = -(-max_context // block_size)
    num_blocks = min(fitting, per_sequence * max_running)
    return KVPlan(num_blocks, min(max_context, num_blocks * block_size))


def free_bytes(device: torch.device) -> int:
    """What the device, or for a CPU the system and the limits of this process, would still give away."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes()

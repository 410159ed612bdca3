"""How much memory the cache may take, and how many sequences run at once."""

from __future__ import annotations

import torch

from engine.api.errors import ModelRefused
from engine.device.machine_memory import available_bytes

GPU_SHARE = 0.92
GPU_RUNNING = 256  # a step of 64 decodes reads the weights for little more than half of the tokens that it could
CPU_LIMIT_BYTES = 2 << 30
CPU_SHARE = 0.25
CPU_RUNNING = 64


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


def free_bytes(device: torch.device) -> int:
    """What the device, or for a CPU the system and the limits of this process, would still give away."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes()

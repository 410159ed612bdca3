"""What a model on a CPU may take of the machine. No torch."""

from __future__ import annotations

from engine.device.machine_memory import available_bytes

MAX_RUNNING = 64
# The other three quarters are for packing the weights, which are loaded by then, for steps, for what the allocator
# holds back, and for the front end and further models under the same limit.
CACHE_SHARE = 0.25
CACHE_LIMIT_BYTES = 2 << 30


def cache_bytes(kv_memory: float | None, reserved: int) -> int:
    """Bytes for the cache; by default a quarter of the free memory and 2 GiB at most.

    A ``kv_memory`` above 1 is bytes, which are taken as given, because untouched pages take no memory; one up to 1 is a
    share of what is free and not ``reserved``.
    """
    free = max(0, available_bytes() - reserved)
    if kv_memory is None:
        return min(CACHE_LIMIT_BYTES, int(free * CACHE_SHARE))
    return int(kv_memory if kv_memory > 1 else free * kv_memory)

"""Memory that the system hands out zeroed when it is first written. No torch."""

from __future__ import annotations

import mmap


def zeroed(num_bytes: int) -> mmap.mmap:
    """A start does not wait for gigabytes to be cleared, and a cache that stays half empty takes half."""
    return mmap.mmap(-1, num_bytes, access=mmap.ACCESS_COPY)

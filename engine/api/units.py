"""Numbers for people."""

from __future__ import annotations

_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def size(num_bytes: int) -> str:
    """For people: "79.1 GiB"."""
    for unit, one in _UNITS:
        if num_bytes >= one:
            return f"{num_bytes / one:.1f} {unit}"
    return f"{num_bytes} bytes"

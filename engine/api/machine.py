"""The CPUs and the memory that this process may use: a container may limit them below what the machine has."""

from __future__ import annotations

from engine.device.cpu_count import cores
from engine.device.machine_memory import total_bytes

__all__ = ["cores", "total_bytes"]

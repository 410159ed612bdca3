"""What of this machine a process may use, as the engine counts it: less than there is where a container says so."""

from __future__ import annotations

from engine.device.cpu_count import cores
from engine.device.machine_memory import total_bytes

__all__ = ["cores", "total_bytes"]

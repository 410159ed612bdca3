"""What to say where memory runs out. No torch."""

from __future__ import annotations

import errno
import re

from engine.api.errors import OutOfMemory
from engine.api.units import size
from engine.failures import first_line


def of_the_machine(free: int, total: int) -> str:
    """How much of the machine's memory there is, as a clause that follows a colon."""
    return f"of {size(total)} for this process, {size(free)} are available"


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out, of a device or of the machine; torch, drivers and Python say so in their own ways."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    line = first_line(error).lower()
    has_its_type = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    return has_its_type or "out of memory" in line or "can't allocate memory" in line


def step_ran_out(error: BaseException, who_holds: str) -> OutOfMemory:
    """The answer to a request whose step failed with ``error`` because memory ran out."""
    wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    return OutOfMemory(
        f"Memory ran out while this request was computed: {f'{wanted[1]} were wanted; ' if wanted else ''}"
        f"{who_holds}. Send a shorter prompt, or have the operator lower kv_memory or max_running."
    )

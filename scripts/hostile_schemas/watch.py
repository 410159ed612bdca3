"""The memory of a server, read from /proc while it works."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

MIB = 1024 * 1024
EVERY_SECONDS = 0.1


class OverLimit(Exception):
    """The server takes more memory than it may; the message says how much."""


class MemoryWatch:
    """Resident memory in bytes, of the front end (process ``pid``) and of all its descendants in total: at the start
    and at its peak. ``watch`` raises ``OverLimit`` when either has grown by more than it may."""

    def __init__(self, pid: int, *, front_end: int, children: int) -> None:
        self._pid = pid
        self._limits = (front_end, children)
        self.start = self.peak = self._sample()

    async def watch(self) -> None:
        """Sample until cancelled."""
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            found = self._sample()
            self.peak = (max(self.peak[0], found[0]), max(self.peak[1], found[1]))
            for name, now, before, most in zip(("front end", "children"), found, self.start, self._limits, strict=True):
                if now - before > most:
                    raise OverLimit(
                        f"the {name} grew from {before // MIB} to {now // MIB} MiB; {most // MIB} more may be"
                    )

    def _sample(self) -> tuple[int, int]:
        return resident_bytes(self._pid), sum(map(resident_bytes, descendants(self._pid)))


def resident_bytes(pid: int) -> int:
    """The resident memory of a process; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


def descendants(pid: int) -> Iterator[int]:
    """The processes that a process has started, and those that they have started."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in children:
            yield child
            yield from descendants(child)

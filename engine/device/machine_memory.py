"""How much memory this process may use: less than the machine has if a control group (a container) limits it.

No torch: the front end imports it too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engine.device import control_groups

_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
_USED = ("memory.current", "memory.usage_in_bytes")


class _Bound(NamedTuple):
    """The bytes that a group may use, and those in use that cannot be reclaimed."""

    limit: int
    used: int


def total_bytes(root: Path = Path("/")) -> int:
    """The machine's memory, or the lowest limit of its control groups. ``root`` is where /proc and /sys are."""
    return min([_of_the_machine("MemTotal", root), *(bound.limit for bound in _bounds(root))])


def available_bytes(root: Path = Path("/")) -> int:
    """What could still be taken without swapping, and without being killed for a limit."""
    left = (max(0, bound.limit - bound.used) for bound in _bounds(root))
    return min([_of_the_machine("MemAvailable", root), *left])


def _of_the_machine(field: str, root: Path) -> int:
    """A line of /proc/meminfo in bytes; the size of the memory on systems that have no such file.

    sysconf does not count the page cache as free, which is most of a machine's memory after weights were read.
    """
    lines = control_groups.read(root / "proc/meminfo").splitlines()
    for name, _, value in (line.partition(":") for line in lines):
        if name == field:
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _bounds(root: Path) -> Iterator[_Bound]:
    """What the control groups of this process allow. One without a limit says "max" or a number beyond all memory."""
    for folder in control_groups.folders("memory", root):
        counters = [line.split() for line in control_groups.read(folder / "memory.stat").splitlines()]
        stat = {name: int(value) for name, value in (pair for pair in counters if len(pair) == 2)}
        # Version 1 reports the lowest limit above it, also of groups that a container cannot see.
        limits = [stat[key] for key in ("hierarchical_memory_limit",) if key in stat] + _numbers(folder, _LIMITS)
        if limits:
            # Pages of files that have not been used lately are reclaimed before any process is killed.
            reclaimable = stat.get("total_inactive_file", stat.get("inactive_file", 0))
            yield _Bound(min(limits), max(0, sum(_numbers(folder, _USED)) - reclaimable))


def _numbers(folder: Path, names: tuple[str, ...]) -> list[int]:
    texts = [control_groups.read(folder / name).strip() for name in names]
    return [int(text) for text in texts if text.isdigit()]

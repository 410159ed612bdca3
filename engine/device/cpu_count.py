"""How many CPU cores this process may use: fewer than the machine has if an affinity or a quota limits them."""

from __future__ import annotations

import math
import os
from pathlib import Path

from engine.device import control_groups


def default_threads() -> int:
    """OMP_NUM_THREADS if set, as in every torch program; else all cores, minus one for the front end if over two."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    usable = cores()
    return usable - 1 if usable > 2 else usable


def cores(root: Path = Path("/")) -> int:
    """The cores that this process may use, those of its quota rounded up. ``root`` is where /proc and /sys are.

    More threads than a quota (``docker run --cpus=2``) has cores use it up early in each period, and then all wait.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    least = float(allowed)
    for folder in control_groups.folders("cpu", root):
        for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):  # version 2 of the interface and 1
            numbers = " ".join(control_groups.read(folder / file) for file in files).split()
            if len(numbers) == 2 and numbers[0].isdigit() and numbers[1].isdigit():  # neither "max" nor -1
                least = min(least, int(numbers[0]) / int(numbers[1]))
    return max(1, math.ceil(least))

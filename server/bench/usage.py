"""Memory and CPU use of a server and all processes that it started while it is under load, from /proc."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
INTERVAL_SECONDS = 0.5


@dataclass(slots=True)
class Usage:
    """Bytes, seconds of one core, and cores; None where /proc does not have them.

    ``peak_rss`` is the largest RSS that was seen; RSS counts a shared page once for each process. ``last_pss``, which
    divides a shared page among its processes, is read only at the end: the kernel walks all pages for it, a tenth of a
    second for ten gigabytes, which must not disturb a load. ``other_cores`` is how many cores were used neither by the
    server nor by this client, but by other programs of the machine or other guests of its host.
    """

    peak_rss: int | None = None
    last_pss: int | None = None
    server_cpu_seconds: float | None = None
    other_cores: float | None = None


def process_tree(root: int) -> list[int]:
    """The process, its children, and theirs; without those that ended meanwhile."""
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        for children in (PROC / str(pid) / "task").glob("*/children"):
            waiting += map(int, _text(children).split())
    return found


def tree_rss(root: int) -> int | None:
    """The RSS of the tree in bytes."""
    pages = [_text(PROC / str(pid) / "statm").split() for pid in process_tree(root)]
    known = [int(numbers[1]) for numbers in pages if numbers]
    return os.sysconf("SC_PAGE_SIZE") * sum(known) if known else None


def tree_pss(root: int) -> int | None:
    """The PSS of the tree in bytes."""
    rollups = [_text(PROC / str(pid) / "smaps_rollup") for pid in process_tree(root)]
    sizes = [re.search(r"^Pss:\s+(\d+) kB$", rollup, re.MULTILINE) for rollup in rollups]
    known = [1024 * int(size[1]) for size in sizes if size]
    return sum(known) if known else None


def tree_cpu_seconds(root: int) -> float | None:
    """The CPU seconds that the processes of the tree have used so far."""
    ticks = [_text(PROC / str(pid) / "stat").rpartition(")")[2].split() for pid in process_tree(root)]
    known = [int(fields[11]) + int(fields[12]) for fields in ticks if fields]  # utime and stime, proc(5)
    return sum(known) / os.sysconf("SC_CLK_TCK") if known else None


def machine_cpu_seconds() -> float | None:
    """The CPU seconds used on this machine so far by any process, or given by its host to other guests (steal)."""
    fields = _text(PROC / "stat").partition("\n")[0].split()[1:]
    if not fields:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


@contextmanager
def watched(root: int | None) -> Iterator[Usage]:
    """The usage of the tree during the block; complete when the block has ended."""
    usage = Usage()
    if root is None:
        yield usage
        return
    ended = threading.Event()

    def sample() -> None:
        while True:
            usage.peak_rss = max(filter(None, (usage.peak_rss, tree_rss(root))), default=None)
            if ended.wait(INTERVAL_SECONDS):
                return

    sampler = threading.Thread(target=sample, daemon=True)
    started, client = time.monotonic(), time.process_time()
    server, machine = tree_cpu_seconds(root), machine_cpu_seconds()
    sampler.start()
    try:
        yield usage
    finally:
        ended.set()
        sampler.join()
        seconds, client = time.monotonic() - started, time.process_time() - client
        usage.server_cpu_seconds = _grown(server, tree_cpu_seconds(root))
        machine_used = _grown(machine, machine_cpu_seconds())
        if machine_used is not None and usage.server_cpu_seconds is not None:
            usage.other_cores = max(machine_used - usage.server_cpu_seconds - client, 0.0) / seconds
        usage.last_pss = tree_pss(root)


def _grown(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it ended, or belongs to another user
        return ""

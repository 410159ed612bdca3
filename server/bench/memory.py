"""The memory of a process and all that it started, from /proc."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
INTERVAL_SECONDS = 0.5


@dataclass(slots=True)
class Memory:
    """Bytes; None where /proc does not tell. RSS counts a page that several processes share in each of them.

    ``peak_rss`` is the most that was seen. ``last_pss``, in which each process has its share of a page, is that of the
    end: for PSS the kernel walks through all pages, a tenth of a second for ten gigabytes, which no load must meet.
    """

    peak_rss: int | None = None
    last_pss: int | None = None


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


@contextmanager
def watched(root: int | None) -> Iterator[Memory]:
    """The memory of the tree during the block, sampled; complete when the block has ended."""
    memory = Memory()
    if root is None:
        yield memory
        return
    ended = threading.Event()

    def sample() -> None:
        while True:
            memory.peak_rss = max(filter(None, (memory.peak_rss, tree_rss(root))), default=None)
            if ended.wait(INTERVAL_SECONDS):
                return

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield memory
    finally:
        ended.set()
        sampler.join()
        memory.last_pss = tree_pss(root)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it ended, or belongs to somebody else
        return ""

"""Folders that stand for the root of a machine: what /proc and /sys say of its memory and of its control groups."""

from __future__ import annotations

from pathlib import Path


def machine(root: Path, groups: str, mounts: str = "", memory: str = "", **files: str) -> Path:
    """``files`` by their path below /sys/fs/cgroup, with ``__`` for a slash; what is empty is not there."""
    proc = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, "proc/meminfo": memory}
    for name, text in {**proc, **{f"sys/fs/cgroup/{place}": text for place, text in files.items()}}.items():
        if text:
            path = root / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return root

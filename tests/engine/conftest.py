"""What every test of the process border shares."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest


@pytest.fixture
def sockets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where engines put their temporary folders: empty again after every test."""
    folder = tmp_path_factory.mktemp("s")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
async def nothing_is_left(sockets: Path) -> AsyncIterator[None]:
    """No process, socket, pipe, task or folder outlives an engine that was closed."""
    before, children_before = open_files(), children()
    yield
    assert not list(sockets.iterdir())
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith("engine ")] == []
    assert children() <= children_before
    gc.collect()
    assert open_files() <= before


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


def children() -> set[int]:
    """This process's children, the unburied among them (Linux: proc(5), field 4 of stat is the parent)."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[1] == str(os.getpid()):
                found.add(int(stat.parent.name))
    return found

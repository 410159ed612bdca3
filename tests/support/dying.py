"""A process that kills itself while it changes files: ``python -m support.dying OPERATION STEP PROGRAM``.

OPERATION is one of ``OPERATIONS``. The process gets SIGKILL when it is about to make the change number STEP (from 0 on)
of the disk within that operation: each write, truncation, sync, removal and commit is one. PROGRAM is ``server.cli``
with its arguments, or ``-c`` and Python code.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable
from typing import Any

from server.storage.files.catalog import Catalog
from server.storage.files.store import FileStore
from server.storage.files.upload import Uploads, Writer

OPERATIONS: dict[str, list[tuple[type, str]]] = {
    "start": [(Uploads, "start")],
    "chunk": [(Uploads, "writer"), (Writer, "write"), (Writer, "close")],
    "finalize": [(Uploads, "finish")],
    "cancel": [(Uploads, "cancel")],
    "delete": [(FileStore, "delete")],
    "sweep": [(FileStore, "sweep")],
}
CHANGES = ("open", "pwrite", "ftruncate", "fsync", "fdatasync", "unlink")

armed = threading.local()


def arm(operation: str, step: int) -> None:
    """From now on the process dies at that step of that operation."""
    left = [step]

    def changing() -> None:
        if getattr(armed, "yes", False):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    for name in CHANGES:
        setattr(os, name, _after(changing, getattr(os, name)))
    _count_commits(changing)
    for owner, name in OPERATIONS[operation]:
        setattr(owner, name, _armed(getattr(owner, name)))


def _after(first: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    def changed(*args: Any, **named: Any) -> Any:
        first()
        return function(*args, **named)

    return changed


def _armed(function: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*args: Any, **named: Any) -> Any:
        before, armed.yes = getattr(armed, "yes", False), True
        try:
            return function(*args, **named)
        finally:
            armed.yes = before

    return watched


def _count_commits(changing: Callable[[], None]) -> None:
    class Counted(sqlite3.Connection):
        def commit(self) -> None:
            changing()
            super().commit()

    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **named: connect(*args, factory=Counted, **named)  # type: ignore[assignment]
    assert Catalog.__init__.__globals__["sqlite3"] is sqlite3


def main() -> None:
    operation, step, *program = sys.argv[1:]
    arm(operation, int(step))
    if program[0] == "-c":
        exec(compile(program[1], "<program>", "exec"), {"__name__": "__main__"})
        return
    from server.cli import main as castor

    sys.argv = ["castor", *program[1:]]
    castor()


if __name__ == "__main__":
    main()

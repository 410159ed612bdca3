"""Jobs for child processes, which must find them in a module: slow, greedy, dying ones."""

from __future__ import annotations

import os
import time
from typing import Any

from server.errors import InvalidArgument


def echo(value: Any) -> Any:
    return value


def sleeping(*_: Any) -> None:
    """Never ends."""
    while True:
        time.sleep(1)


def greedy(size: int) -> int:
    return len(bytearray(size))


def hoarding(*_: Any) -> int:
    """Takes more than any child has."""
    return greedy(64 * 1024**3)


def dying(number: int) -> None:
    os.kill(os.getpid(), number)


def refusing() -> None:
    raise InvalidArgument.at("a.b", "a.b: is wrong")


def failing() -> None:
    raise ZeroDivisionError


def printing() -> str:
    print("not an answer", flush=True)
    os.write(1, b"nor this")
    return "the answer"


def environment() -> dict[str, str]:
    return dict(os.environ)


def process() -> int:
    return os.getpid()


def is_running(pid: int) -> bool:
    """Whether there is a process of that number, for the parent's side."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

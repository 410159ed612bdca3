"""``small_gemini.py`` as a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from support.server import free_port
from support.waiting import wait_until

PROGRAM = Path(__file__).with_name("small_gemini.py")


def small_command(port: int, log: Path, limit: int) -> list[str]:
    """The command line of a server that writes requests to ``log`` and refuses those after ``limit``."""
    return [sys.executable, str(PROGRAM), str(port), str(log), str(limit)]


@contextmanager
def small_server(log: Path, limit: int = 1000) -> Iterator[str]:
    """The URL of such a server, which lives as long as the block."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return httpx.get(url, timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    with subprocess.Popen(small_command(port, log, limit)) as process:
        try:
            wait_until(answers)
            yield url
        finally:
            process.kill()

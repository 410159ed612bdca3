"""A real server as a subprocess: started on a free loopback port, watched, ended by its process id."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 240.0
PORTS = (10_000, 32_000)
_PATHS = os.pathsep.join(path for path in sys.path if path)


def free_port() -> int:
    """A port that nothing listens on, from below the range that the system gives to outgoing connections.

    Out of that range it could go to a client of another test before the server binds it, or to the very client that
    waits for the server and would then be connected to itself.
    """
    while True:
        # Not from random: in a random order its seed, and so the port, is the same in all processes of the suite.
        port = PORTS[0] + secrets.randbelow(PORTS[1] - PORTS[0])
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def command_line(pid: str) -> bytes:
    """The command of a process; nothing where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


class RunningServer:
    """``castor serve ARGS`` with its log in a file; ``client`` speaks to it. ``program`` runs in place of castor."""

    def __init__(
        self,
        folder: Path,
        *args: str,
        environment: dict[str, str] | None = None,
        program: Sequence[str] = ("server.cli",),
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = folder / f"server-{self.port}.log"
        self._log = self.log_path.open("wb")
        command = [sys.executable, "-m", *program, "serve", *args, "--port", str(self.port)]
        command += ["--data-dir", str(folder / "data")]
        self.process = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _PATHS, **(environment or {})},
        )
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log()}")
            try:
                if self.client.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise TimeoutError(f"the server was not ready within {START_SECONDS} s:\n{self.log()}")

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def request_log(self) -> list[dict[str, Any]]:
        """The JSON log lines of requests, oldest first."""
        lines = [line for line in self.log().splitlines() if line.startswith("{")]
        return [entry for entry in map(json.loads, lines) if "status" in entry]

    def generate(self, body: dict[str, Any], model: str = "smollm2-135m-instruct") -> httpx.Response:
        return self.client.post(f"/v1beta/models/{model}:generateContent", json=body)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels; 0 where there are none."""
        total = 0.0
        for line in self.client.get("/metrics").text.splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == name and all(f'{key}="{want}"' in series for key, want in labels.items()):
                total += float(value)
        return total

    def resident_bytes(self) -> int:
        """The memory of the front end, without its engines."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

    def engine_pids(self) -> list[int]:
        """The process ids of the engines: the server's children that run the worker."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"engine.process.worker" in command_line(pid)]

    def stop(self, seconds: float = 30) -> int:
        """Ask the server to end as an operator would; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=seconds)
            raise
        finally:
            self.client.close()
            self._log.close()


@contextmanager
def running_server(folder: Path, *args: str, environment: dict[str, str] | None = None) -> Iterator[RunningServer]:
    """A server that is ready when the block starts and gone when it ends."""
    server = RunningServer(folder, *args, environment=environment)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()

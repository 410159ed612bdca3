"""``castor serve`` in a process of its own: started, asked and ended."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_checks.check import Check

ROOT = Path(__file__).resolve().parents[3]
_ENDING_SECONDS = 8.0


def environment() -> dict[str, str]:
    """Ours, without what is set for this process only or for another server."""
    own = ("TRITON_INTERPRET", "PYTORCH_ALLOC_CONF")
    kept = {name: value for name, value in os.environ.items() if name not in own and not name.startswith("CASTOR_")}
    # Packages on this process's path must be found there too.
    paths = [str(ROOT), *(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path)]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def cores_of() -> tuple[set[int], set[int]]:
    """The cores for a server and those for its load: apart where there are enough, else all for both."""
    cores = sorted(os.sched_getaffinity(0))
    few = len(cores) // 4
    return (set(cores[:-few]), set(cores[-few:])) if few >= 2 else (set(cores), set(cores))


class Served:
    """A server of the model in ``folder``; what it writes lies in ``place`` under ``name``."""

    def __init__(self, check: Check, folder: Path, place: Path, name: str) -> None:
        while True:
            # Below the range of ephemeral ports: no client takes it between this check and the server's bind.
            self.port = secrets.choice(range(10_000, 32_000))
            with socket.socket() as probe, suppress(OSError):
                probe.bind(("127.0.0.1", self.port))
                break
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = place / f"{name}.log"
        command = [sys.executable, "-m", "server.cli", "serve", str(folder), "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--data-dir", str(place / f"{name}-data")]
        command += ["--cache-dir", str(place / "cache"), "--drain-seconds", "1"]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment(), cwd=ROOT
            )
        check.children.append(self.process)
        os.sched_setaffinity(self.process.pid, cores_of()[0])

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; status 0 where nothing answers."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except (urllib.error.URLError, OSError):
            return 0, ""

    def wait_until_ready(self, seconds: float) -> float | None:
        """Seconds until it was ready; None if it ended, or was not within ``seconds``."""
        started = time.monotonic()
        while self.process.poll() is None and time.monotonic() < started + seconds:
            if self.get("/readyz")[0] == 200:
                return time.monotonic() - started
            time.sleep(0.1)
        return None

    def detail(self) -> str:
        """What /readyz says of the model."""
        with suppress(ValueError, KeyError):
            for model in json.loads(self.get("/readyz")[1])["models"].values():
                return f"{model['state']}: {model['detail']}"
        return "it does not answer"

    def metric(self, name: str) -> float:
        """The sum of a metric; NaN where it is not there."""
        lines = [line for line in self.get("/metrics")[1].splitlines() if line.partition("{")[0] == name]
        return sum(float(line.rpartition(" ")[2]) for line in lines) if lines else float("nan")

    def engine_pid(self) -> int | None:
        """The engine's process, while there is one."""
        for folder in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and b"engine.process.worker" in (folder / "cmdline").read_bytes():
                    return int(folder.name)
        return None

    def last_lines(self, number: int = 4) -> str:
        """The end of its log."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(lines[-number:])[-800:] or "its log is empty"

    def said(self, word: str) -> str:
        """The last line of its log that holds a word; may be empty."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if word in line]
        return lines[-1][-500:] if lines else ""

    def end(self) -> None:
        """Ask it to end, and kill it if it does not."""
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(_ENDING_SECONDS)


class Stream:
    """A streamed answer, read by ``follow`` in a thread of its own and cut off by ``hang_up``.

    ``chunks`` counts those with text, ``errors`` are messages, and ``ended`` is when the last byte came.
    """

    def __init__(self, served: Served, text: str, tokens: int) -> None:
        self.chunks = 0
        self.status = 0
        self.errors: list[str] = []
        self.ended: float | None = None
        self._connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        settings = {"maxOutputTokens": tokens, "temperature": 0.8}
        content = {"role": "user", "parts": [{"text": text}]}
        self._body = json.dumps({"contents": [content], "generationConfig": settings})
        self._path = f"/v1beta/{model_of(served)}:streamGenerateContent?alt=sse"

    def follow(self) -> None:
        """Read to the end. What breaks the connection is an error of its own."""
        try:
            self._connection.request("POST", self._path, self._body, {"content-type": "application/json"})
            answer = self._connection.getresponse()
            self.status = answer.status
            if answer.status != 200:
                self._take(answer.read())
            else:
                for line in answer:
                    if line.startswith(b"data: "):
                        self._take(line[6:])
        except (OSError, ValueError, http.client.HTTPException, AttributeError) as error:
            self.errors.append(f"{type(error).__name__}: {error}")
        self.ended = time.monotonic()

    def _take(self, data: bytes) -> None:
        item: Any = json.loads(data)
        if "error" in item:
            self.errors.append(str(item["error"]["message"]))
        else:
            self.chunks += 1

    def hang_up(self) -> None:
        """Close the connection from our side."""
        with suppress(OSError, AttributeError):
            self._connection.sock.shutdown(socket.SHUT_RDWR)


def model_of(served: Served) -> str:
    """The name of the model that is served, as paths hold it."""
    name: str = json.loads(served.get("/v1beta/models")[1])["models"][0]["name"]
    return name

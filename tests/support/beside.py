"""What requests do to everybody else, measured: to text streams, /healthz, memory and the end of a real server."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import httpx
from support.server import RunningServer
from support.strangers import Request
from support.waiting import wait_until

MODEL = "smollm2-135m-instruct"
STREAMS, AT_ONCE = 4, 8
POLL_SECONDS = 0.05
END_SECONDS = 60.0
"""From SIGTERM to the end of the process: far more than the drain and the closing of the engine."""


@dataclass(frozen=True, slots=True)
class Beside:
    """What was seen meanwhile: times in seconds, memory in bytes.

    ``gap`` is the longest time between two tokens of a stream, ``alone`` the longest before the first request: what the
    machine itself makes of it. ``streamed`` counts the tokens. ``health`` are the times that /healthz took, asked again
    ``POLL_SECONDS`` after each answer. ``before`` and ``peak`` are the resident memory of the front end. ``statuses``
    are those of the requests, 0 where the connection broke.
    """

    gap: float
    alone: float
    streamed: int
    health: list[float]
    before: int
    peak: int
    statuses: list[int]

    @property
    def median_health(self) -> float:
        return statistics.median(self.health)

    def __str__(self) -> str:
        return (
            f"gap {self.gap * 1000:.0f} ms ({self.alone * 1000:.0f} alone) over {self.streamed} tokens; /healthz "
            f"{self.median_health * 1000:.1f} ms at the median and {max(self.health) * 1000:.0f} ms at most of "
            f"{len(self.health)}; the front end had {self.before >> 20} MiB and then {self.peak >> 20} MiB; answered "
            f"{sorted(self.statuses)}"
        )


def beside_streams(server: RunningServer, requests: list[Request]) -> Beside:
    """Send ``requests``, ``AT_ONCE`` at a time, beside ``STREAMS`` streams."""
    with _watched(server) as watch, ThreadPoolExecutor(AT_ONCE) as senders:
        statuses = list(senders.map(lambda request: _sent(server, request), requests))
        wait_until(lambda: len(watch.health) > 5 and all(stream.gaps for stream in watch.streams))
    gaps = [gap for stream in watch.streams for gap in stream.gaps]
    return Beside(max(gaps), watch.alone, len(gaps), watch.health, watch.memory[0], max(watch.memory), statuses)


class _Stream:
    """A stream of text, and the next one when it has ended, until ``over``; the seconds between its tokens."""

    def __init__(self, server: RunningServer, number: int) -> None:
        self.gaps: list[float] = []
        self.over = threading.Event()
        self._url = f"{server.url}/v1beta/models/{MODEL}:streamGenerateContent?alt=sse"
        config = {"maxOutputTokens": 1000, "temperature": 0.9, "seed": number}
        self._body = {"contents": [{"parts": [{"text": "Tell me a long story."}]}], "generationConfig": config}

    def run(self) -> None:
        while not self.over.is_set():
            with httpx.stream("POST", self._url, json=self._body, timeout=END_SECONDS) as answer:
                assert answer.status_code == 200, answer.read()
                last = 0.0
                for line in filter(None, answer.iter_lines()):
                    now = time.monotonic()
                    assert "error" not in json.loads(line.removeprefix("data: ")), line
                    if last:
                        self.gaps.append(now - last)
                    last = now
                    if self.over.is_set():
                        return


class _Watch:
    """Everything that is measured beside the requests, each in a thread of its own."""

    def __init__(self, server: RunningServer) -> None:
        self.streams = [_Stream(server, number) for number in range(STREAMS)]
        self.alone = 0.0
        self.health: list[float] = []
        self.memory = [server.resident_bytes()]
        self.over = threading.Event()
        self._server = server

    def poll_health(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=END_SECONDS)
        while not self.over.wait(POLL_SECONDS):
            began = time.monotonic()
            connection.request("GET", "/healthz")
            answer = connection.getresponse()
            answer.read()
            self.health.append(time.monotonic() - began)
            assert answer.status == 200
        connection.close()

    def sample_memory(self) -> None:
        while not self.over.wait(POLL_SECONDS):
            self.memory.append(self._server.resident_bytes())


@contextmanager
def _watched(server: RunningServer) -> Iterator[_Watch]:
    """From the moment when every stream has some tokens to the end of the block. Raises what a watcher has raised."""
    watch = _Watch(server)
    jobs: list[Callable[[], None]] = [stream.run for stream in watch.streams]
    with ThreadPoolExecutor(STREAMS + 2) as pool:
        running: list[Future[None]] = [pool.submit(job) for job in jobs]
        try:
            wait_until(lambda: all(len(one.gaps) > 20 for one in watch.streams) or any(job.done() for job in running))
            for stream in watch.streams:
                watch.alone = max(watch.alone, *stream.gaps[5:])
                stream.gaps.clear()
            watch.memory = [server.resident_bytes()]
            running += [pool.submit(watch.poll_health), pool.submit(watch.sample_memory)]
            yield watch
        finally:
            for over in (watch.over, *(stream.over for stream in watch.streams)):
                over.set()
        for job in running:
            job.result()


def _sent(server: RunningServer, request: Request) -> int:
    try:
        if request.raw:
            return _sent_raw(server, request.raw)
        return httpx.post(server.url + request.path, content=request.content, timeout=END_SECONDS).status_code
    except (httpx.TransportError, OSError):
        return 0


def _sent_raw(server: RunningServer, data: bytes) -> int:
    with socket.create_connection(("127.0.0.1", server.port), timeout=END_SECONDS) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # what was said before the end may still be read
            connection.sendall(data)
        head = connection.recv(4096).split()
    return int(head[1]) if len(head) > 1 else 0


def status_after_the_signal(server: RunningServer, requests: list[Request]) -> int | None:
    """The exit status of a server that is asked to end while a stream and ``AT_ONCE`` of these requests are under way;
    None where it had to be killed."""
    stream = _Stream(server, 0)
    with ThreadPoolExecutor(AT_ONCE + 1) as pool:
        streaming = pool.submit(stream.run)
        wait_until(lambda: stream.gaps or streaming.done())
        for request in requests:
            pool.submit(_sent, server, request)
        time.sleep(0.5)  # whether the requests are read by then changes what is measured, not how it should end
        server.process.send_signal(signal.SIGTERM)
        try:
            return server.process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            server.process.kill()
            return None
        finally:
            stream.over.set()

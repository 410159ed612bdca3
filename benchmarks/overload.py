"""What a full server does: a burst of simultaneous requests, then arrivals at a multiple of what it can serve.

    .venv/bin/python benchmarks/overload.py http://127.0.0.1:8080 [--burst 1500] [--bursts 7] [--times 10]

Raw sockets, one connection for each request, one process, pinned to one CPU that it never leaves idle. First a closed
loop that keeps the server full and no more gives the peak; meanwhile the generator sends as many requests as the open
loop will to a socket of its own, so that it and the connections in the kernel cost the server the same. Then the
bursts, one after the other, of which the medians count; then the open loop at ``--times`` that peak. A rejection's time
runs from the first step of its connection to the last byte of its answer; one that broke off before it was read is
counted as broken.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import selectors
import socket
import statistics
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.harness.programs import ROOT
from server.bench.environment import describe
from server.bench.results.report import write

PATIENCE = 120.0


@dataclass(slots=True)
class Call:
    """One request; times in seconds of ``time.monotonic()``."""

    sock: socket.socket
    started: float
    ended: float = 0.0
    unsent: bytes = b""
    answer: bytearray = field(default_factory=bytearray)
    broken: bool = False

    @property
    def status(self) -> int:
        """0 where no whole answer came."""
        head, end, body = bytes(self.answer).partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
        return int(head[9:12]) if end and not self.broken and length.isdigit() and len(body) >= int(length) else 0


class Generator:
    """Sends requests to one server and reads their answers, without ever sleeping."""

    def __init__(self, url: str, model: str, tokens: int) -> None:
        place = urlsplit(url)
        self._address = (place.hostname or "127.0.0.1", place.port or 80)
        question = {"role": "user", "parts": [{"text": "Tell me a story about a river."}]}
        body = json.dumps({"contents": [question], "generationConfig": {"maxOutputTokens": tokens}}).encode()
        head = f"POST /v1beta/models/{model}:generateContent HTTP/1.1\r\nhost: localhost\r\n"
        head += f"content-type: application/json\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        self._request = head.encode() + body
        self._selector = selectors.EpollSelector()
        self.open = 0
        self.ended: list[Call] = []

    def send(self) -> None:
        """Begin one request."""
        call = Call(socket.socket(), time.monotonic(), unsent=self._request)
        call.sock.setblocking(False)
        call.sock.connect_ex(self._address)
        self._selector.register(call.sock, selectors.EVENT_WRITE, call)
        self.open += 1

    def turn(self) -> None:
        """Do whatever can be done at once."""
        for key, _ in self._selector.select(0):
            call: Call = key.data
            try:
                if call.unsent:
                    call.unsent = call.unsent[call.sock.send(call.unsent) :]
                    if not call.unsent:
                        self._selector.modify(call.sock, selectors.EVENT_READ, call)
                    continue
                piece = call.sock.recv(65536)
            except OSError:
                piece, call.broken = b"", True
            call.answer += piece
            if not piece or call.status:
                self._selector.unregister(call.sock)
                call.sock.close()
                call.ended = time.monotonic()
                self.open -= 1
                self.ended.append(call)

    def answered(self, begin: float, end: float) -> int:
        """How many answers came between these instants."""
        return sum(begin <= call.ended < end for call in self.ended if call.status == 200)

    def finish(self) -> None:
        """Read what is still to come, for at most ``PATIENCE`` seconds."""
        deadline = time.monotonic() + PATIENCE
        while self.open and time.monotonic() < deadline:
            self.turn()


class Sink:
    """Answers every request at once, in the process that sends it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.setblocking(False)
        self._callers: deque[socket.socket] = deque()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def turn(self) -> None:
        """Answer whoever has come."""
        with suppress(BlockingIOError):
            while self._callers:
                self._callers[0].recv(65536)
                caller = self._callers.popleft()
                caller.send(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n")
                caller.close()
        with suppress(BlockingIOError):
            caller, _ = self._listener.accept()
            caller.setblocking(False)
            self._callers.append(caller)


def closed_loop(
    generator: Generator, in_flight: int, seconds: float, beside: float, fake: Generator, sink: Sink
) -> float:
    """Answers a second while ``in_flight`` requests are always open, in the second half of the time; ``beside`` that,
    ``fake`` sends so many requests a second to the ``sink``."""
    began, sent = time.monotonic(), 0
    while (now := time.monotonic()) < began + seconds:
        if generator.open < in_flight:
            generator.send()
        if sent < (now - began) * beside:
            fake.send()
            sent += 1
        generator.turn()
        fake.turn()
        sink.turn()
    return generator.answered(began + seconds / 2, now) / (seconds / 2)


def burst(generator: Generator, size: int) -> dict[str, Any]:
    """So many requests at the same time, and all their answers."""
    began = time.monotonic()
    for _ in range(size):
        generator.send()
    generator.finish()
    return summary(generator.ended, began, time.monotonic())


def median(found: list[dict[str, Any]], name: str) -> float:
    """Of one figure of several summaries; NaN where none has it."""
    return float(statistics.median([each[name] for each in found if name in each] or [math.nan]))


def open_loop(generator: Generator, rate: float, seconds: float) -> float:
    """Answers a second while requests arrive at ``rate``, in the second half of the time."""
    began, sent = time.monotonic(), 0
    while (now := time.monotonic()) < began + seconds:
        if sent < (now - began) * rate:
            generator.send()
            sent += 1
        generator.turn()
    return generator.answered(began + seconds / 2, now) / (seconds / 2)


def summary(calls: list[Call], began: float, until: float) -> dict[str, Any]:
    """Counts by status, and the times of rejections of requests that began between these instants."""
    asked = [call for call in calls if began <= call.started < until]
    times = sorted(call.ended - call.started for call in asked if call.status == 429)
    statuses = [call.status for call in asked]
    found: dict[str, Any] = {str(status or "broken"): statuses.count(status) for status in sorted(set(statuses))}
    if times:
        found |= {f"p{share}": times[min(len(times) - 1, len(times) * share // 100)] for share in (50, 99, 100)}
    return found


def main() -> None:
    """Measure, print and write JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("url")
    options.add_argument("--model", default="gemini-2.5-flash")
    options.add_argument("--tokens", type=int, default=16)
    options.add_argument("--full", type=int, default=256, help="requests in flight that keep the server full")
    options.add_argument("--burst", type=int, default=1500)
    options.add_argument("--bursts", type=int, default=7)
    options.add_argument("--times", type=float, default=10.0)
    options.add_argument("--seconds", type=float, default=20.0)
    options.add_argument("--output", type=Path)
    given = options.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    def fresh(url: str = given.url) -> Generator:
        return Generator(url, given.model, given.tokens)

    generator, sink = fresh(), Sink()
    fake = fresh(sink.url)
    rough = closed_loop(generator, given.full, given.seconds, 0, fake, sink)
    peak = closed_loop(generator, given.full, given.seconds, rough * given.times, fake, sink)
    generator.finish()
    bursts = [burst(fresh(), given.burst) for _ in range(given.bursts)]
    generator, began = fresh(), time.monotonic()
    kept = open_loop(generator, peak * given.times, given.seconds)
    until = time.monotonic()
    generator.finish()
    arrivals = summary(generator.ended, began, until)
    print(f"peak        {peak:.1f} answers/s with {given.full} requests in flight")
    for found in bursts:
        print(f"burst       {found}")
    print(f"            median p50 {median(bursts, 'p50'):.3f} s, p99 {median(bursts, 'p99'):.3f} s")
    print(f"open loop   {arrivals}, {peak * given.times:.0f} arrivals/s")
    print(f"            {kept:.1f} answers/s, {kept / max(peak, 1e-9):.3f} of the peak")
    if given.output:
        figures = {"peak": peak, "kept": kept, "bursts": bursts, "arrivals": arrivals}
        print(write({"scenario": "overload", "environment": describe(sys.argv, {}, ROOT), **figures}, given.output))


if __name__ == "__main__":
    main()

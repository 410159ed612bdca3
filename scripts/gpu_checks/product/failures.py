"""What goes wrong with a server on a GPU, made on purpose: clients that leave, a dead engine, a card that is full."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread

import torch

from engine.device.device_memory import free_bytes, size
from gpu_checks.check import Check
from gpu_checks.product.serving import Served, Stream
from server.bench.prompts import WORDS

PART = "server"
_GIVEN_BACK = 256 << 20
"""Bytes that a GPU's driver may keep of a server that has ended."""
_FREED_SECONDS = 5.0


def cancelled_streams(check: Check, served: Served) -> None:
    """Clients that leave amid their streams: their blocks are given back, and /metrics says so."""
    if not check.has_time(PART, "cancelled streams", 8.0):
        return
    streams = _begun(check, served)
    held = served.metric("castor_kv_blocks_used")
    left = time.monotonic()
    for stream in streams:
        stream.hang_up()
    free = _until(lambda: served.metric("castor_kv_blocks_used") == 0, _FREED_SECONDS)
    note = f"{len(streams)} streams held {held:.0f} blocks; none after {time.monotonic() - left:.2f} s"
    check.report.checked(PART, "blocks of cancelled streams are given back", free, note)


def full_card(check: Check, served: Served) -> None:
    """Another process takes all memory that is free: requests go on, or one of them ends with a sentence."""
    if not check.has_time(PART, "a full card", 15.0):
        return
    engine, taken = served.engine_pid(), _take_all(check)
    short = [Stream(served, f"Tell me {number}.", 32) for number in range(2 if check.machine.smoke else 8)]
    long = Stream(served, " ".join(WORDS[:1] * (60 if check.machine.smoke else 24_000)), 4)  # a token each
    threads = [_followed(stream) for stream in (*short, long)]
    _join(threads, min(20.0, check.budget.left))
    taken.clear()
    check.machine.forget()
    failed = [stream.errors for stream in short if stream.errors or stream.ended is None]
    outcome = long.errors[0] if long.errors else f"{long.chunks} chunks" if long.ended else "not within its time"
    holds = not failed and served.engine_pid() == engine and long.ended is not None
    note = f"the long prompt: {outcome}; {len(short) - len(failed)} of {len(short)} others are answered"
    note += f" ({failed[0]})" if failed else ""
    check.report.checked(PART, "a card that another process fills", holds, note)


def killed_engine(check: Check, served: Served) -> None:
    """kill -9 of the engine amid streams: each ends with one error, requests get 503, and it comes back."""
    if not check.has_time(PART, "kill -9 of the engine", 25.0):
        return
    engine = served.engine_pid()
    if engine is None:
        check.report.failed(PART, "kill -9 of the engine", "its process is not found")
        return
    streams = _begun(check, served)
    os.kill(engine, signal.SIGKILL)
    killed = time.monotonic()
    _until(lambda: all(stream.ended for stream in streams), 10.0)
    ended = max((stream.ended or float("inf") for stream in streams), default=killed) - killed
    errors = [len(stream.errors) for stream in streams]
    late = Stream(served, "Are you there?", 2)
    late.follow()
    said = streams[0].errors[0] if streams[0].errors else "nothing"
    note = f"{len(streams)} streams ended within {ended:.2f} s: {said}"
    check.report.checked(PART, "kill -9: each stream ends with one error", set(errors) == {1}, note)
    refusal = late.errors[0] if late.errors else "no error"
    check.report.checked(PART, "kill -9: requests get 503", late.status == 503, f"{late.status}: {refusal}")
    back = served.wait_until_ready(max(1.0, min(60.0, check.budget.left)))
    if back is None:
        check.report.failed(PART, "kill -9: until it serves again", f"{served.detail()}; {served.last_lines()}")
        return
    check.report.number(PART, "kill -9: until it serves again", time.monotonic() - killed, "s")


def second_server(check: Check, first: Served, folder: Path, place: Path, free_before: int) -> None:
    """A second server on the same GPU, beside the first and after its end; both end here.

    ``free_before`` is what was free before the first was started.
    """
    name = "a second server on the same device"
    if not check.has_time(PART, name, 25.0):
        first.end()
        return
    second = Served(check, folder, place, "second")
    try:
        details: list[str] = []

        def has_decided() -> bool:
            # Kept, because one that is refused tries again when it is asked.
            details.append(second.detail())
            return details[-1].startswith(("ready", "failed")) or second.process.poll() is not None

        decided = _until(has_decided, max(1.0, min(60.0, check.budget.left)))
        answers = [Stream(served, "Who are you?", 4) for served in (first, second) if served.get("/readyz")[0] == 200]
        _join([_followed(stream) for stream in answers], 10.0)
        good = sum(stream.chunks > 0 and not stream.errors for stream in answers)
        note = f"{details[-1]}; {good} of both answer; {second.said('KV cache:') or second.last_lines()}"
        check.report.checked(PART, f"{name} serves or says why not", decided, note)
        with_both = free_bytes(check.machine.device)
        first.end()
        after = free_bytes(check.machine.device)
        ready = second.wait_until_ready(max(1.0, min(40.0, check.budget.left)))
        if ready is None:
            check.report.failed(PART, "the second server after the end of the first", second.detail())
        else:
            note = f"free with both {size(with_both)}, without the first {size(after)}"
            check.report.number(PART, "the second server after the first has ended, until ready", ready, "s", note)
    finally:
        second.end()
    if not check.machine.smoke:
        back = _until(lambda: free_bytes(check.machine.device) >= free_before - _GIVEN_BACK, _FREED_SECONDS)
        note = f"free before {size(free_before)}, afterwards {size(free_bytes(check.machine.device))}"
        check.report.checked(PART, "the memory of servers that have ended is given back", back, note)


def _begun(check: Check, served: Served) -> list[Stream]:
    """Streams under way, each with some text."""
    number, tokens = (2, 40) if check.machine.smoke else (16, 4000)
    streams = [Stream(served, f"Tell me story {n}.", tokens) for n in range(number)]
    for stream in streams:
        _followed(stream)
    _until(lambda: all(stream.chunks > 1 or stream.ended for stream in streams), 10.0)
    return streams


def _followed(stream: Stream) -> Thread:
    thread = Thread(target=stream.follow, daemon=True)
    thread.start()
    return thread


def _join(threads: list[Thread], seconds: float) -> None:
    until = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


def _until(holds: Callable[[], bool], seconds: float) -> bool:
    """Whether it holds within so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if holds():
            return True
        time.sleep(0.05)
    return holds()


def _take_all(check: Check) -> list[torch.Tensor]:
    """All memory that is free on the GPU, in ever smaller pieces."""
    taken: list[torch.Tensor] = []
    piece = 8 << 30
    while not check.machine.smoke and piece >= 2 << 20:
        with suppress(torch.OutOfMemoryError):
            taken.append(torch.empty(piece, dtype=torch.uint8, device=check.machine.device))
            continue
        piece //= 2
    return taken

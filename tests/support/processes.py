"""Starts engines with the scripted core and looks at what they do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from support.scripted_worker import COMMAND, Kind

from engine.api.engine import EngineConfig
from engine.api.events import CandidateFinished, Delta, ErrorKind, Event, FinishReason, RequestFinished
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.process.client import ProcessEngine

PATIENCE = 60
ENDLESS = 10**6


@contextlib.asynccontextmanager
async def engine(
    path: str = "", *, stall: float = 60, load_stall: float = 60, running: int = 64, waiting: int = 256
) -> AsyncIterator[ProcessEngine]:
    config = EngineConfig(path, max_running=running, max_waiting=waiting)
    process_engine = ProcessEngine(
        config,
        name="scripted",
        stall_seconds=stall,
        load_stall_seconds=load_stall,
        stop_seconds=5,
        command=COMMAND,
    )
    process_engine.start()
    try:
        yield process_engine
    finally:
        await asyncio.wait_for(process_engine.close(), PATIENCE)


@contextlib.asynccontextmanager
async def ready_engine(*, stall: float = 60, running: int = 64, waiting: int = 256) -> AsyncIterator[ProcessEngine]:
    async with engine(stall=stall, running=running, waiting=waiting) as process_engine:
        await asyncio.wait_for(process_engine.ready(), PATIENCE)
        yield process_engine


def request(name: str, tokens: int = 3, *, kind: Kind = Kind.STEADY, candidates: int = 1) -> Request:
    return Request(name, (kind, 7), SamplingParams(max_tokens=tokens), candidates)


async def read(stream: AsyncIterator[Event]) -> list[Event]:
    async with asyncio.timeout(PATIENCE):
        return [event async for event in stream]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


async def is_idle(process_engine: ProcessEngine) -> None:
    """Wait until neither side knows of any request."""
    await until(lambda: not process_engine._pending and process_engine.health().stats.running == 0)


def pid_of(process_engine: ProcessEngine) -> int:
    assert process_engine._worker is not None
    return process_engine._worker.pid


def is_alive(pid: int) -> bool:
    """Whether a process runs; on Linux one that its new parent has not buried yet does not."""
    try:
        os.kill(pid, 0)
        return sys.platform != "linux" or ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


def assert_failed(events: list[Event], candidates: int = 1) -> None:
    """Aborted candidates, then the one terminal error, with the counts of what was told before."""
    told = [len(e.token_ids) for e in events if isinstance(e, Delta)]
    aborted = [e for e in events if isinstance(e, CandidateFinished)]
    done = [e for e in events if isinstance(e, RequestFinished)]
    assert [e.reason for e in aborted] == [FinishReason.ABORTED] * candidates
    assert [e.candidate for e in aborted] == list(range(candidates))
    assert sum(e.tokens for e in aborted) == sum(told) == done[0].candidate_tokens
    assert len(done) == 1
    assert events[-1] is done[0]
    assert done[0].error is not None
    assert done[0].error.kind is ErrorKind.UNAVAILABLE

"""Load generation: a closed loop of N streams or an open loop of random arrivals, and the outcome of each request.

In a closed loop each stream sends its next request after an answer, so a slow server gets fewer requests and the
latencies describe N patient clients only. An open loop sends at times drawn in advance and measures latency from these
times, even if the client itself was late.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from server.bench.wire.client import BaseUrl, HttpError, post
from server.bench.wire.counting import Outcome, TokenCounter
from server.bench.wire.protocols import Call, Dialect, SseReader

REQUEST_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class Target:
    """A server under load. ``pid`` is its root process if we started it on this machine."""

    name: str
    url: BaseUrl
    dialect: Dialect
    model: str
    api_key: str | None = None
    pid: int | None = None


@dataclass(slots=True)
class Load:
    """The outcomes of one load on one server. ``cpu_seconds`` is the CPU time of this client."""

    outcomes: list[Outcome]
    seconds: float
    cpu_seconds: float


def joined(loads: Sequence[Load]) -> Load:
    """Merge loads that alternated into one."""
    outcomes = [outcome for load in loads for outcome in load.outcomes]
    return Load(outcomes, sum(load.seconds for load in loads), sum(load.cpu_seconds for load in loads))


class Clock:
    """Seconds since the load began."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._cpu = time.process_time()

    def now(self) -> float:
        """The current time."""
        return time.perf_counter() - self._start

    def load(self, outcomes: list[Outcome]) -> Load:
        """The load that ends now."""
        return Load(outcomes, self.now(), time.process_time() - self._cpu)


async def perform(target: Target, call: Call, clock: Clock, intended: float) -> Outcome:
    """Make one request and follow its answer. Never raises for what the server does."""
    outcome = Outcome(intended, sent=clock.now())
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            await _follow(target, call, clock, outcome)
    except TimeoutError:
        outcome.error = f"no complete answer within {REQUEST_SECONDS:.0f} s"
    except (HttpError, OSError, ValueError, LookupError) as error:
        outcome.error = str(error) or type(error).__name__
    outcome.ended = clock.now()
    return outcome


async def _follow(target: Target, call: Call, clock: Clock, outcome: Outcome) -> None:
    path, body = target.dialect.request(target.model, call)
    counter, reader = TokenCounter(outcome), SseReader()
    async with post(target.url, path, body, target.dialect.headers(target.api_key)) as answer:
        async for piece in answer.pieces():
            now = clock.now()
            counter.take(map(target.dialect.read, reader.feed(piece)), now)
            if call.hang_up_after is not None and len(outcome.gaps) >= call.hang_up_after:
                outcome.cancelled = True
                break
    counter.settle()
    if outcome.succeeded and outcome.finish_reason is None:
        outcome.error = "the stream ended without a finish reason"


async def closed_loop(
    target: Target, calls: Sequence[Call], streams: int, *, least: int | None = None, seconds: float = 0.0
) -> Load:
    """Make all calls, ``streams`` at a time; with ``least``, only that many, then more until ``seconds`` have
    passed."""
    clock, outcomes = Clock(), list[Outcome]()
    waiting = enumerate(calls)
    enough = len(calls) if least is None else least

    async def stream() -> None:
        for number, call in waiting:
            if number >= enough and clock.now() >= seconds:
                return
            outcomes.append(await perform(target, call, clock, clock.now()))

    await asyncio.gather(*(stream() for _ in range(min(streams, len(calls)))))
    return clock.load(outcomes)


async def open_loop(target: Target, calls: Sequence[Call], arrivals: Sequence[float]) -> Load:
    """Make each call at its arrival time, whether or not the server keeps up."""
    clock = Clock()

    async def arrive(call: Call, instant: float) -> Outcome:
        await asyncio.sleep(max(0.0, instant - clock.now()))
        return await perform(target, call, clock, instant)

    outcomes = await asyncio.gather(*map(arrive, calls, arrivals))
    return clock.load(list(outcomes))


def poisson_arrivals(rate: float, number: int, seed: int) -> list[float]:
    """The times in seconds of ``number`` arrivals at ``rate`` per second on average; the same for the same seed."""
    source, instant, arrivals = random.Random(seed), 0.0, []
    for _ in range(number):
        instant += source.expovariate(rate)
        arrivals.append(instant)
    return arrivals

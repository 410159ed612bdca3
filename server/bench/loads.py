"""The load that each scenario puts on a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import replace

from server.bench.load import Clock, Load, closed_loop, joined, perform
from server.bench.prompts import SCHEMA
from server.bench.results.measure import tail
from server.bench.session import Session
from server.bench.usage import watched
from server.bench.wire.counting import Outcome
from server.bench.wire.protocols import Call
from server.config.errors import ConfigError

KV_BLOCKS_USED = "castor_kv_blocks_used"
IDLE_SECONDS = 10.0
SHARING = 10
"""One in this many requests has a prefix of its own."""


def streams_name(streams: int) -> str:
    """The name of a closed loop."""
    return "1 stream" if streams == 1 else f"{streams} streams"


async def throughput(session: Session) -> None:
    """Stories on each number of streams; then arrivals at the rates of the plan."""
    plan, best = session.plan, 0.0
    for streams in plan.streams:
        calls = session.prompts.stories(plan.most(streams), plan.tokens)
        measured = await session.closed(streams_name(streams), calls, streams)
        assert measured.summary is not None
        best = max(best, measured.summary.requests_per_second)
    number = plan.most(plan.most_streams)
    for rate in plan.rates:
        await session.open(f"{rate:g} a second", session.prompts.stories(number, plan.tokens), rate)
    for share in plan.shares:
        await session.open(f"{share:g} of most", session.prompts.stories(number, plan.tokens), share * best)


async def sweep(session: Session) -> None:
    """Prompts and answers of fixed lengths on each number of streams."""
    plan = session.plan
    for streams in plan.streams:
        calls = session.prompts.words(plan.most(streams), plan.prompt_tokens, plan.tokens)
        await session.closed(streams_name(streams), calls, streams)


async def conversations(session: Session) -> None:
    """The maximum throughput on prompts of mixed lengths; then arrivals at shares of it."""
    plan = session.plan
    number = plan.most(plan.most_streams)
    calls = session.prompts.conversations(number, plan.prompt_tokens, plan.tokens)
    most = await session.closed("saturation", calls, plan.most_streams)
    assert most.summary is not None
    for share in plan.shares:
        calls = session.prompts.conversations(number, plan.prompt_tokens, plan.tokens)
        await session.open(f"{share:g} of saturation", calls, share * most.summary.requests_per_second)


async def shared_prefix(session: Session) -> None:
    """Long prompts that share nothing, then as many of which nine in ten share a prefix."""
    plan, prompts = session.plan, session.prompts
    number = plan.most(plan.most_streams)
    await session.closed("apart", prompts.words(number, plan.prompt_tokens, plan.tokens), plan.most_streams)
    prefix = prompts.text(plan.prompt_tokens)
    calls = [
        prompts.words(1, plan.prompt_tokens, plan.tokens)[0]
        if index % SHARING == SHARING - 1
        else Call(f"{prefix}. {prompts.text(8)}. Go on.", plan.tokens)
        for index in range(number)
    ]
    await session.closed("shared", calls, plan.most_streams)


async def constrained(session: Session) -> None:
    """Stories as free text and as JSON that follows a schema, on each number of streams."""
    plan = session.plan
    with_schema = [replace(call, schema=SCHEMA) for call in session.prompts.stories(2, 8)]
    await closed_loop(session.target, with_schema, 2)  # the grammar is compiled once
    for streams in plan.streams:
        calls = session.prompts.stories(plan.most(streams), plan.tokens)
        await session.closed(f"free {streams}", calls, streams)
        calls = session.prompts.stories(plan.most(streams), plan.tokens)
        await session.closed(f"schema {streams}", [replace(call, schema=SCHEMA) for call in calls], streams)


async def cancelling(session: Session) -> None:
    """Stories, then stories of which every second one is cancelled midway; then wait until no block is held."""
    plan = session.plan
    number = plan.most(plan.most_streams)
    await session.closed("undisturbed", session.prompts.stories(number, plan.tokens), plan.most_streams)
    calls = session.prompts.stories(number, plan.tokens)
    leaving = [
        replace(call, hang_up_after=max(plan.tokens // 4, 1)) if index % 2 else call for index, call in enumerate(calls)
    ]
    measured = await session.closed("half cancelled", leaving, plan.most_streams)
    started = time.monotonic()
    while (held := await session.metric(KV_BLOCKS_USED)) and time.monotonic() - started < IDLE_SECONDS:
        await asyncio.sleep(0.05)
    measured.numbers |= {"kv_blocks_held": held, "seconds_until_free": time.monotonic() - started}


async def repeated_prefix(session: Session) -> None:
    """Pairs of requests with a common prefix, one at a time: what the second one saves."""
    plan = session.plan
    loads: dict[str, list[Load]] = {"first": [], "second": []}
    prefixes = [session.prompts.text(plan.prompt_tokens) for _ in range(plan.most(1))]
    clock = Clock()
    with watched(session.target.pid) as usage:
        for number, prefix in enumerate(prefixes):
            if number >= plan.least(1) and clock.now() >= plan.seconds:
                break
            for name, question in (("first", "What is it about?"), ("second", "Who wrote it?")):
                calls = [Call(f"{prefix}. {question}", plan.tokens)]
                loads[name].append(await closed_loop(session.target, calls, 1))
    for name, parts in loads.items():
        session.add(name, joined(parts), usage, kind="closed loop", streams=1)


async def intrusion(session: Session) -> None:
    """Running streams alone; then the same while one very long prompt arrives."""
    plan = session.plan
    number = plan.most_streams * plan.requests
    alone = await session.closed("alone", session.prompts.stories(number, plan.tokens), plan.most_streams)
    assert alone.load is not None
    delay = alone.load.seconds / 4  # every stream runs by then, and none has ended
    calls = session.prompts.stories(number, plan.tokens)
    (long_call,) = session.prompts.words(1, plan.prompt_tokens, 1)
    clock = Clock()

    async def intrude() -> Outcome:
        await asyncio.sleep(delay)
        return await perform(session.target, long_call, clock, clock.now())

    with watched(session.target.pid) as usage:
        load, intruder = await asyncio.gather(closed_loop(session.target, calls, plan.most_streams), intrude())
    measured = session.add("intruded", load, usage, kind="closed loop", streams=plan.most_streams)
    if intruder.first is None:
        raise ConfigError(f"{session.target.name} did not answer the long prompt: {intruder.error or 'no text came'}")
    until = intruder.first
    # Neither includes the start of the streams, whose own prompts cause pauses.
    before = gaps_between(alone.load.outcomes, delay, alone.load.seconds)
    beside = gaps_between(load.outcomes, intruder.sent, until)
    measured.numbers |= {
        "intruder_prompt_tokens": intruder.prompt_tokens or 0,
        "intruder_ttft": until - intruder.sent,
        "tokens_beside": len(beside),
    }
    for name, gaps in (("itl_p99_alone", before), ("itl_p99_beside", beside)):
        if (seconds := tail(gaps)) is not None:
            measured.numbers[name] = seconds


def gaps_between(outcomes: Iterable[Outcome], since: float, until: float) -> list[float]:
    """The inter-token time of each token after the first whose gap overlaps the interval."""
    found: list[float] = []
    for outcome in outcomes:
        end = outcome.first or 0.0
        for seconds, tokens in outcome.gaps:
            begin, end = end, end + seconds
            if tokens and begin < until and end > since:
                found += [seconds / tokens] * max(round(tokens), 1)
    return found

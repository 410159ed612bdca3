"""The process client: streams, cancellation, admission."""

from __future__ import annotations

import asyncio

import pytest
from support.processes import (
    ENDLESS,
    PATIENCE,
    engine,
    is_idle,
    read,
    ready_engine,
    request,
    until,
)

from engine.api.engine import Engine
from engine.api.errors import EngineUnavailable, Overloaded, RequestRefused
from engine.api.events import (
    CandidateFinished,
    Delta,
    ErrorKind,
    FinishReason,
    RequestError,
    RequestEvents,
    RequestFinished,
    TokenLogprobs,
)
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.process.client import EventStream, PendingRequest

pytestmark = pytest.mark.usefixtures("nothing_is_left")


async def test_events_in_order_and_every_type_kept() -> None:
    async with ready_engine() as process_engine:
        as_engine: Engine = process_engine
        assert as_engine.describe().model_type == "scripted"
        events = await read(as_engine.submit(request("a", 50, candidates=2)))
        for candidate in (0, 1):
            deltas = [e for e in events if isinstance(e, Delta) and e.candidate == candidate]
            assert [token for delta in deltas for token in delta.token_ids] == list(range(50))
        assert [type(e) for e in events[-3:]] == [CandidateFinished, CandidateFinished, RequestFinished]
        assert events[-1] == RequestFinished(2, 0, 100)
        await is_idle(process_engine)


async def test_half_of_32_streams_are_closed_and_the_others_do_not_notice() -> None:
    async def read_some(stream: EventStream) -> None:
        for _ in range(10):
            await anext(stream)
        await stream.aclose()
        assert [event async for event in stream] == []

    async with ready_engine() as process_engine:
        kept = [process_engine.submit(request(f"kept {n}", 100 + n)) for n in range(16)]
        closed = [process_engine.submit(request(f"closed {n}", ENDLESS)) for n in range(16)]
        everything = await asyncio.gather(*map(read, kept), *map(read_some, closed))
        for n, events in enumerate(everything[:16]):
            assert isinstance(events, list)
            assert events[-1] == RequestFinished(2, 0, 100 + n)
            assert "".join(e.text for e in events if isinstance(e, Delta)) == "".join(f"{i} " for i in range(100 + n))
        await is_idle(process_engine)


async def test_cancel_ends_the_stream_once() -> None:
    async with ready_engine() as process_engine:
        stream = process_engine.submit(request("a", ENDLESS))
        await anext(stream)
        process_engine.cancel("a")
        process_engine.cancel("unknown")
        *_, finished, done = await read(stream)
        assert isinstance(finished, CandidateFinished)
        assert isinstance(done, RequestFinished)
        assert done.error is not None
        assert done.error.kind is ErrorKind.CANCELLED
        process_engine.cancel("a")


async def test_a_cancelled_reader_cancels_its_request() -> None:
    async with ready_engine() as process_engine:
        reader = asyncio.create_task(read(process_engine.submit(request("a", ENDLESS))))
        await until(lambda: process_engine.health().stats.running == 1)
        reader.cancel()
        await asyncio.wait({reader}, timeout=PATIENCE)
        assert reader.cancelled()
        await is_idle(process_engine)


@pytest.mark.parametrize("events_read", [0, 2])
async def test_a_dropped_stream_cancels_its_request(events_read: int) -> None:
    async with ready_engine() as process_engine:
        stream = process_engine.submit(request("a", ENDLESS))
        for _ in range(events_read):
            await anext(stream)
        await until(lambda: process_engine.health().stats.running == 1)
        del stream
        await is_idle(process_engine)


async def test_a_stream_read_late_is_complete() -> None:
    async with ready_engine() as process_engine:
        stream = process_engine.submit(request("a", 20))
        await is_idle(process_engine)
        assert (await read(stream))[-1] == RequestFinished(2, 0, 20)


def deltas(candidate: int, *texts: str, thought: bool = False) -> RequestEvents:
    return RequestEvents(
        "a", tuple(Delta(candidate, (len(text),), text, (TokenLogprobs(-1.0),), thought) for text in texts)
    )


async def test_deltas_that_wait_for_the_reader_come_as_one() -> None:
    pending = PendingRequest(request("a", candidates=2))
    pending.push(deltas(0, "a", "bb"))
    pending.push(deltas(0, "ccc"))
    assert await pending.next() == Delta(0, (1, 2, 3), "abbccc", (TokenLogprobs(-1.0),) * 3)
    pending.push(deltas(0, "d"))
    assert await pending.next() == Delta(0, (1,), "d", (TokenLogprobs(-1.0),))


async def test_nothing_else_is_joined_and_the_order_stands() -> None:
    pending = PendingRequest(request("a", candidates=2))
    finished = CandidateFinished(0, FinishReason.STOP, 4)
    parts = [deltas(0, "t", "h", thought=True), deltas(0, "x"), deltas(1, "y"), deltas(0, "z")]
    for part in parts:
        pending.push(part)
    pending.push(RequestEvents("a", finished=(finished,)))
    pending.push(deltas(1, "w"))
    pending.fail(RequestError(ErrorKind.UNAVAILABLE, "gone"))
    found = [await pending.next() for _ in range(8)]
    assert [(e.candidate, e.text, e.thought) for e in found if isinstance(e, Delta)] == [
        (0, "th", True), (0, "x", False), (1, "y", False), (0, "z", False), (1, "w", False),
    ]  # fmt: skip
    assert found[4] == finished
    assert found[6:] == [
        CandidateFinished(1, FinishReason.ABORTED, 2),
        RequestFinished(2, 0, 6, RequestError(ErrorKind.UNAVAILABLE, "gone")),
    ]


async def test_a_reader_that_waits_gets_what_comes() -> None:
    pending = PendingRequest(request("a"))
    reader = asyncio.create_task(pending.next())
    await asyncio.sleep(0)
    assert not reader.done()
    pending.push(deltas(0, "a"))
    assert isinstance(await asyncio.wait_for(reader, PATIENCE), Delta)


async def test_more_candidates_than_allowed_are_turned_away_at_once() -> None:
    async with ready_engine(running=2, waiting=3) as process_engine:
        assert process_engine.room() == 5
        streams = [process_engine.submit(request(str(n), ENDLESS, candidates=2)) for n in range(2)]
        assert process_engine.room() == 1
        with pytest.raises(Overloaded, match=r"4 candidates in flight.* 2 more .*limit is 5"):
            process_engine.submit(request("too many", candidates=2))
        assert (await read(process_engine.submit(request("fits"))))[-1] == RequestFinished(2, 0, 3)
        await streams[0].aclose()
        await until(lambda: len(process_engine._pending) == 1)
        assert (await read(process_engine.submit(request("room again", candidates=2))))[-1] == RequestFinished(2, 0, 6)
        await streams[1].aclose()


async def test_ids_in_use_and_values_that_cannot_travel_are_refused() -> None:
    async with ready_engine() as process_engine:
        stream = process_engine.submit(request("a", ENDLESS))
        with pytest.raises(RequestRefused, match="'a' is in use"):
            process_engine.submit(request("a"))
        with pytest.raises(RequestRefused, match="64 bits"):
            process_engine.submit(Request("b", (1,), SamplingParams(max_tokens=1, seed=2**70)))
        await stream.aclose()


async def test_nothing_is_taken_before_it_is_ready() -> None:
    async with engine("slow") as process_engine:
        for _ in range(2):
            with pytest.raises(EngineUnavailable, match="scripted is loading"):
                process_engine.submit(request("a"))
            with pytest.raises(EngineUnavailable):
                process_engine.describe()
            await until(lambda: process_engine.health().progress == 0.5)
        assert process_engine.health().detail == "weights"

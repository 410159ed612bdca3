"""Loads on a scripted server over real sockets."""

from __future__ import annotations

import asyncio
import socket
from itertools import pairwise
from statistics import fmean

import pytest
from support.sse_server import gemini_event, openai_event, sse_server

from server.bench.load import Clock, Target, closed_loop, joined, open_loop, perform, poisson_arrivals
from server.bench.wire.client import BaseUrl
from server.bench.wire.protocols import Call, Dialect, Gemini, OpenAi

ANSWER = (gemini_event("a", 1), gemini_event("b", 2), gemini_event("c", 3, "STOP"))
CALL = Call("Tell me.", 3)


def target(url: BaseUrl, dialect: Dialect | None = None) -> Target:
    return Target("server", url, dialect or Gemini(), "m")


async def test_a_request() -> None:
    async with sse_server((ANSWER[0], 0.5, *ANSWER[1:])) as server:
        outcome = await perform(target(server.url), CALL, Clock(), 0.0)
    assert outcome.error is None
    assert (outcome.output_tokens, outcome.prompt_tokens, outcome.finish_reason) == (3, 7, "STOP")
    assert outcome.first is not None
    assert 0 < outcome.first < outcome.ended
    assert sum(tokens for _, tokens in outcome.gaps) == 2
    assert outcome.gaps[0][0] >= 0.1  # of 0.5 seconds: the client may be late for the first event


async def test_an_openai_stream_in_tiny_pieces() -> None:
    first = openai_event("a")
    rest = openai_event("b") + openai_event(finish="length") + openai_event(total=2) + b"data: [DONE]\n\n"
    pieces = [bytes([byte]) for byte in first], [bytes([byte]) for byte in rest]
    async with sse_server([*pieces[0], 0.02, *pieces[1]]) as server:
        outcome = await perform(target(server.url, OpenAi()), CALL, Clock(), 0.0)
    assert (outcome.error, outcome.output_tokens, outcome.finish_reason) == (None, 2, "length")
    assert len(outcome.gaps) == 1


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        ((ANSWER[0],), "200 OK", "without a finish reason"),
        ((b'data: {"error": {"message": "the engine is gone"}}\n\n',), "200 OK", "the engine is gone"),
        ((b'{"error": {"message": "queue full"}}',), "429 Too Many Requests", "HTTP 429"),
        ((b"data: [1\n\n",), "200 OK", "Expecting"),
        ((b"data: [1]\n\n",), "200 OK", "an event that this API does not have: [1]"),
    ],
)
async def test_what_goes_wrong_is_the_outcome(script: tuple[bytes, ...], status: str, words: str) -> None:
    async with sse_server(script, status=status) as server:
        outcome = await perform(target(server.url), CALL, Clock(), 0.0)
    assert outcome.error is not None
    assert words in outcome.error


async def test_nobody_there() -> None:
    with socket.socket() as silent:  # it has its port and does not listen, nor can anybody else there
        silent.bind(("127.0.0.1", 0))
        url = BaseUrl("http", "127.0.0.1", silent.getsockname()[1], "")
        outcome = await perform(target(url), CALL, Clock(), 0.0)
    assert outcome.error


async def test_a_client_that_hangs_up() -> None:
    long = [piece for number in range(1, 200) for piece in (gemini_event("a", number), 0.005)]
    async with sse_server(long) as server:
        outcome = await perform(target(server.url), Call("Tell me.", 200, hang_up_after=3), Clock(), 0.0)
    assert outcome.cancelled
    assert outcome.error is None
    assert len(outcome.gaps) == 3


async def test_a_closed_loop_keeps_so_many_requests_open() -> None:
    async with sse_server((0.01, *ANSWER), together=4) as server:
        load = await closed_loop(target(server.url), [CALL] * 10, 4)
        assert server.most == 4
    assert len(load.outcomes) == len(server.bodies) == 10
    assert all(outcome.succeeded for outcome in load.outcomes)
    assert load.seconds >= 0.025
    assert load.cpu_seconds > 0


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    arrivals = [0.0, 0.01, 0.02, 0.03]
    async with sse_server(ANSWER, together=4) as server:
        load = await open_loop(target(server.url), [CALL] * 4, arrivals)
        assert server.most == 4
    assert [outcome.intended for outcome in load.outcomes] == arrivals
    assert all(outcome.sent >= outcome.intended for outcome in load.outcomes)


def test_loads_that_took_turns() -> None:
    load = joined([])
    assert (load.outcomes, load.seconds, load.cpu_seconds) == ([], 0, 0)


def test_poisson_arrivals_are_the_same_for_the_same_seed() -> None:
    arrivals = poisson_arrivals(5.0, 2000, 1)
    assert arrivals == poisson_arrivals(5.0, 2000, 1) != poisson_arrivals(5.0, 2000, 2)
    pauses = [after - before for before, after in pairwise([0.0, *arrivals])]
    assert min(pauses) > 0
    assert fmean(pauses) == pytest.approx(0.2, rel=0.1)
    variance = fmean((pause - 0.2) ** 2 for pause in pauses)
    assert variance == pytest.approx(0.04, rel=0.25)  # an exponential's deviation is its mean


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata:", "ended before the answer was complete"),
        (b"HTTP/1.1 200 OK\r\n", "ended before the answer was complete"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "does not answer in HTTP"),
        (b"HTTP/1.0 200 OK\r\n\r\n" + b"".join(ANSWER), None),
    ],
)
async def test_connections_that_end(raw: bytes, error: str | None) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        await writer.drain()
        writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listening:
        url = BaseUrl("http", "127.0.0.1", listening.sockets[0].getsockname()[1], "")
        outcome = await perform(target(url), CALL, Clock(), 0.0)
    if error is None:
        assert (outcome.error, outcome.output_tokens) == (None, 3)
    else:
        assert outcome.error is not None
        assert error in outcome.error

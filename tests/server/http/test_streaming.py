"""Streams to the byte, and work that is bound to a client: its result, its failure, and its end when the client goes
away."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message
from support.waiting import PATIENCE

from server.http.streaming import JSON_ARRAY, SERVER_SENT_EVENTS, Framing, StreamedAnswer, until_hangup
from server.observability.metrics import Metrics
from server.observability.request_record import RequestRecord


class Client:
    """Hangs up when told to."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}


class Work:
    """Takes forever and notices its end."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.ended = False

    async def __call__(self) -> None:
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended = True


async def test_the_result_of_the_work() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 5

    assert await until_hangup(Client().receive, work()) == 5


async def test_the_failure_of_the_work() -> None:
    async def work() -> int:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await until_hangup(Client().receive, work())


async def test_a_hang_up_ends_the_work() -> None:
    client, work = Client(), Work()
    waiting = asyncio.create_task(until_hangup(client.receive, work()))
    await work.started.wait()
    client.gone.set()
    with pytest.raises(ClientDisconnect):
        await asyncio.wait_for(waiting, PATIENCE)
    assert work.ended


async def test_cancelling_ends_the_work() -> None:
    work = Work()
    waiting = asyncio.create_task(until_hangup(Client().receive, work()))
    await work.started.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert work.ended
    assert len(asyncio.all_tasks()) == 1


SILENT_AT_THE_END = [
    (SERVER_SENT_EVENTS, r'data: \{"a":1\}\n\ndata: +\{\}\n\n'),
    (JSON_ARRAY, r'\[\{"a":1\} +\]'),
]


@pytest.mark.parametrize(("framing", "body"), SILENT_AT_THE_END)
async def test_a_stream_that_ends_in_a_silence_leaves_nothing_open(framing: Framing, body: str) -> None:
    async def chunks() -> AsyncGenerator[dict[str, Any], None]:
        yield {"a": 1}
        await asyncio.sleep(0.3)

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    answer = StreamedAnswer(chunks(), framing, 0.05, RequestRecord(Metrics(list, "0"), "POST", "/", ""), {})
    await answer({}, Client().receive, send)
    assert [message["type"] for message in sent[:1]] == ["http.response.start"]
    assert [message["more_body"] for message in sent[1:]] == [True] * (len(sent) - 2) + [False]
    assert re.fullmatch(body, b"".join(message["body"] for message in sent[1:]).decode())

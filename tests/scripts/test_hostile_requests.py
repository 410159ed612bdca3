"""What ``scripts/fuzz`` is made of: the same requests for a seed, and an eye for every way to fail."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest
from hostile_requests.made import ANSWERED, OTHERS, Made, made
from hostile_requests.sending import MAX_FAILURES, Answer, ask, problem_of, send, table
from hostile_requests.structure import STRUCTURE
from hostile_requests.wire import BYTES, Wire

CHUNK = {"candidates": [{"finishReason": "STOP"}]}
ERROR = {"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "no"}}


def test_a_seed_and_a_number_make_a_request() -> None:
    forwards = [made(3, number) for number in range(60)]
    assert forwards == [made(3, number) for number in reversed(range(60))][::-1]
    assert made(4, 0) != made(3, 0)


def test_every_mutation_comes_and_recorded_requests_stay_as_they_were() -> None:
    before = copy.deepcopy([*ANSWERED, *OTHERS])
    assert {made(1, number).kind for number in range(2000)} == {*STRUCTURE, *BYTES}
    assert [*ANSWERED, *OTHERS] == before
    assert len(ANSWERED) > 20
    assert len(OTHERS) > 40


@pytest.mark.parametrize("kind", STRUCTURE)
def test_a_mutation_changes_the_structure(kind: str) -> None:
    changed = 0
    for number in range(50):
        body = copy.deepcopy(ANSWERED[number % len(ANSWERED)].body)
        STRUCTURE[kind](Random(number), body)
        changed += repr(body) != repr(ANSWERED[number % len(ANSWERED)].body)
    assert changed > 25
    for small in ({}, [], [1], {"a": {}}):
        STRUCTURE[kind](Random(1), small)


@pytest.mark.parametrize("kind", BYTES)
def test_a_mutation_changes_the_bytes(kind: str) -> None:
    sent = [Wire("POST", "/v1/models/m:generateContent", [], b'{"contents": "hi"}') for _ in range(50)]
    whole = sent[0].content()
    for number, wire in enumerate(sent):
        BYTES[kind](Random(number), wire)
    assert sum(wire.content() != whole for wire in sent) > 40
    empty = Wire("GET", "/v1/models", [], b"")
    BYTES[kind](Random(1), empty)
    assert empty.content()


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Answer(), "without an answer"),
        (Answer(200, {"content-type": "application/json"}, b"{}", whole=False), "broke off"),
        (Answer(500, {"content-type": "application/json"}, json.dumps(ERROR).encode(), whole=True), "status 500"),
        (Answer(504, {"content-type": "application/json"}, json.dumps(ERROR).encode(), whole=True), "status 504"),
        (Answer(200, {"content-type": "application/json"}, b"{", whole=True), "promises"),
        (Answer(400, {"content-type": "application/json"}, b"{}", whole=True), "promises"),
        (
            Answer(400, {"content-type": "application/json"}, b'{"error": {"code": 0, "message": "x"}}', whole=True),
            "no error",
        ),
        (Answer(400, {"content-type": "text/plain"}, b"no", whole=True), "400 as text/plain"),
        (Answer(200, {"content-type": "text/event-stream"}, b"\n\ndata: {}\n\n", whole=True), "no stream"),
        (Answer(200, {"content-type": "text/event-stream"}, b"", whole=True), "no stream"),
        (Answer(200, {"content-type": "text/event-stream"}, b"data: {}\n\n", whole=True), "odd event"),
        (Answer(200, {"content-type": "text/event-stream"}, b"data: {\n\n", whole=True), "promises"),
    ],
)
def test_what_is_wrong_with_an_answer(answer: Answer, problem: str) -> None:
    assert problem in problem_of(Made(1, "case", "drop", b""), answer)


def test_what_is_right_with_an_answer() -> None:
    chunk, error = json.dumps(CHUNK), json.dumps(ERROR)
    stream = {"content-type": "text/event-stream; charset=utf-8"}
    for kind, answer in (
        ("drop", Answer(200, {"content-type": "application/json"}, chunk.encode(), whole=True)),
        ("drop", Answer(501, {"content-type": "application/json"}, error.encode(), whole=True)),
        ("drop", Answer(200, stream, f"data: {chunk}\n\ndata:   {chunk}\n\n".encode(), whole=True)),
        ("drop", Answer(200, stream, f"data: {chunk}\n\ndata: {error}\n\n{error}".encode(), whole=True)),
        ("framing", Answer()),
        ("framing", Answer(400, {"content-type": "text/plain"}, b"no", whole=True)),
    ):
        assert problem_of(Made(1, "case", kind, b""), answer) == ""


@asynccontextmanager
async def answering(status: int, said: object) -> AsyncIterator[int]:
    """The port of a server that answers every request so, or, with the status 0, never."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65_536)
        if status:
            text = json.dumps(said)
            head = f"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 {status} x\r\ncontent-type: application/json\r\n"
            writer.write(f"{head}content-length: {len(text)}\r\n\r\n{text}".encode())
            await writer.drain()
            writer.close()
        else:
            await reader.read()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def test_an_answer_is_read_after_an_interim_one() -> None:
    async with answering(200, {"candidates": []}) as port:
        answer = await ask(port, b"GET / HTTP/1.1\r\n\r\n")
    assert (answer.status, json.loads(answer.body), answer.whole) == (200, {"candidates": []}, True)


@pytest.mark.parametrize("cut", [10, 25, 26, 40, 60, 80, 200])
async def test_an_interim_answer_ends_anywhere_in_what_is_read(cut: int) -> None:
    text = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 400 Bad Request\r\ncontent-length: 5\r\n\r\nwrong"

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(text[:cut])
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(text[cut:])
        await reader.read()
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
        answer = await ask(server.sockets[0].getsockname()[1], b"GET / HTTP/1.1\r\n\r\n")
    assert (answer.status, answer.body, answer.whole) == (400, b"wrong", True)


async def test_an_interim_answer_alone_is_none() -> None:
    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
        answer = await ask(server.sockets[0].getsockname()[1], b"GET / HTTP/1.1\r\n\r\n")
    assert (answer.status, answer.whole) == (0, False)


async def test_the_findings_are_counted() -> None:
    async with answering(400, ERROR) as port:
        findings = await send(port, 1, list(range(30)), at_once=4, seconds=60)
    assert findings.failures == []
    *rows, total = table(findings)
    assert len(rows) == 1 + len(findings.statuses)
    assert total.split() == ["all", "30", "30", "0"]


async def test_silence_is_a_failure_and_many_failures_end_the_run() -> None:
    async with answering(0, None) as port:
        findings = await send(port, 1, [1, 2], at_once=2, seconds=0.05)
    assert [failure.split(": ")[-1] for failure in findings.failures] == ["no answer within 0.05 s"] * 2
    async with answering(500, ERROR) as port:
        findings = await send(port, 1, list(range(500)), at_once=1, seconds=60)
    assert len(findings.failures) == MAX_FAILURES

"""What ``scripts/fuzz_schemas`` is made of: the same inputs for a seed, and an eye for every way to fail."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hostile_schemas.bodies import CARRIERS, body
from hostile_schemas.kinds import KINDS
from hostile_schemas.sending import MAX_FAILURES, Sender, Stopped, summary
from hostile_schemas.watch import MIB, MemoryWatch, OverLimit

ANSWERED = {"candidates": [{"finishReason": "STOP"}]}
REFUSED = {
    "error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "generation_config.x: at most 7 'y' are read"}
}


def test_a_seed_and_a_number_make_an_input() -> None:
    forwards = [body(3, number) for number in range(40)]
    backwards = [body(3, number) for number in reversed(range(40))]
    assert forwards == backwards[::-1]
    assert body(4, 0) != body(3, 0)


def test_every_kind_of_schema_comes_in_every_field() -> None:
    made = [body(1, number) for number in range(700)]
    assert {(one.kind, one.carrier) for one in made} >= {(kind, carrier) for kind in KINDS for carrier in CARRIERS}
    assert all(json.loads(one.content)["contents"] for one in made)


@asynccontextmanager
async def answering(status: int, said: object, *, healthy: bool = True) -> AsyncIterator[str]:
    """A server that answers every input so, or, with the status 0, never."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := (await reader.readuntil(b"\r\n\r\n")).decode():
            probe = head.startswith("GET /healthz ")
            if not probe:
                length = next(line for line in head.lower().splitlines() if line.startswith("content-length"))
                await reader.readexactly(int(length.split()[1]))
            if status == 0 and not (probe and healthy):
                await asyncio.Event().wait()
            text = json.dumps(said)
            writer.write(f"HTTP/1.1 {200 if probe else status} x\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode())

    server = await asyncio.start_server(speak, "127.0.0.1", 0, limit=2**22)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


async def sent(url: str, *, seconds: float = 60, count: int = 6) -> Sender:
    sender = Sender(url, "m", 1, 2, seconds)
    await sender.send(iter(range(count)))
    return sender


async def test_answers_and_refusals_are_counted() -> None:
    async with answering(200, ANSWERED) as url:
        answered = (await sent(url)).findings
    assert (answered.failures, dict(answered.outcomes)) == ([], {"200 ": 6})
    async with answering(400, REFUSED) as url:
        refused = (await sent(url)).findings
    assert (refused.failures, dict(refused.outcomes)) == ([], {"400 at most N '…' are read": 6})
    assert any("400 at most" in line for line in summary(refused))


@pytest.mark.parametrize(
    ("status", "said", "words"),
    [
        (500, REFUSED, "status 500"),
        (503, REFUSED, "status 503"),
        (400, {"detail": "x"}, "no answer in the API's form"),
        (429, REFUSED, "no answer in the API's form"),
        (200, {"candidates": []}, "no answer in the API's form"),
    ],
)
async def test_wrong_answers_are_failures(status: int, said: object, words: str) -> None:
    async with answering(status, said) as url:
        failures = (await sent(url)).findings.failures
    assert len(failures) == 6
    assert all(words in failure for failure in failures)


async def test_a_server_that_is_silent() -> None:
    async with answering(0, {}) as url:
        failures = (await sent(url, seconds=3, count=2)).findings.failures
    assert [failure.rpartition(": ")[2] for failure in failures] == ["no answer within 3 s"] * 2
    async with answering(0, {}, healthy=False) as url:
        with pytest.raises(Stopped, match="/healthz does not answer"):
            await sent(url, seconds=0.5, count=10**6)


async def test_a_run_ends_where_everything_fails() -> None:
    async with answering(500, {}) as url:
        with pytest.raises(Stopped, match=f"{MAX_FAILURES} inputs failed"):
            await sent(url, count=10**6)


async def test_the_memory_of_children_is_seen() -> None:
    watch = MemoryWatch(os.getpid(), front_end=2**60, children=50 * MIB)
    greedy = f"import sys; held = b'x' * {100 * MIB}; sys.stdin.read()"
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", greedy, stdin=asyncio.subprocess.PIPE)
    try:
        with pytest.raises(OverLimit, match="the children grew"):
            await asyncio.wait_for(watch.watch(), 60)
    finally:
        child.kill()
        await child.wait()
    assert watch.peak[1] - watch.start[1] > 50 * MIB

"""The outermost layer: ids, one line per request, and a clean 500 for what nobody expected."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.testing import capture_logs
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from server.http.middleware.record import RecordMiddleware
from server.observability.metrics import Metrics

START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]}


def recorded(app: ASGIApp) -> RecordMiddleware:
    return RecordMiddleware(app, Metrics(list, "1"))


async def ok(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["state"]["identity"] == ""
    await send(dict(START))
    await send({"type": "http.response.body", "body": b"fine"})


async def explode(scope: Scope, receive: Receive, send: Send) -> None:
    raise LookupError("the secret of the house")


async def hang_up(scope: Scope, receive: Receive, send: Send) -> None:
    raise ClientDisconnect


def panic() -> None:
    """A real panic of Rust code, which is no ``Exception``."""
    words = Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?")).encode(["a", "a"], is_pretokenized=True)
    words.truncate(1, stride=1)


async def panic_here(scope: Scope, receive: Receive, send: Send) -> None:
    panic()


async def panic_in_a_thread(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.to_thread(panic)


async def panic_in_a_group(scope: Scope, receive: Receive, send: Send) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.to_thread(panic))


async def stop_in_the_middle(scope: Scope, receive: Receive, send: Send) -> None:
    await send(dict(START))
    await send({"type": "http.response.body", "body": b"par", "more_body": True})


async def explode_in_the_middle(scope: Scope, receive: Receive, send: Send) -> None:
    await stop_in_the_middle(scope, receive, send)
    raise LookupError("late")


async def call(app: ASGIApp, path: str = "/x?key=secret&alt=sse") -> tuple[list[Message], list[Any]]:
    """All that the app sends for one GET, and what it logs."""
    sent: list[Message] = []
    path, _, query = path.partition("?")
    scope = {"type": "http", "method": "GET", "path": path, "query_string": query.encode(), "headers": []}

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    with capture_logs() as lines:
        await recorded(app)({**scope, "client": ("10.0.0.9", 5), "server": ("h", 1), "scheme": "http"}, receive, send)
    return sent, lines


async def test_an_answer_carries_the_id_of_its_log_line() -> None:
    sent, (line,) = await call(ok)
    headers = dict(sent[0]["headers"])
    assert headers[b"x-request-id"].decode() == line["request"]
    assert headers[b"x-own"] == b"1"
    assert (line["status"], line["path"], line["client"], line["http_method"]) == (200, "/x", "10.0.0.9", "GET")
    assert "secret" not in str(line)


async def test_the_unexpected_is_an_envelope_outside_and_a_trace_inside() -> None:
    transport = httpx.ASGITransport(app=recorded(explode))
    with capture_logs() as lines:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await client.get("/x")
    assert answer.status_code == 500
    assert answer.json()["error"]["status"] == "INTERNAL"
    assert "secret" not in answer.text
    trace, line = lines
    assert trace["request"] == line["request"] == answer.headers["x-request-id"]
    assert isinstance(trace["exc_info"], LookupError)
    assert (line["status"], line["error"]) == (500, "INTERNAL")


@pytest.mark.parametrize("app", [panic_here, panic_in_a_thread, panic_in_a_group])
async def test_a_panic_of_a_library_is_the_unexpected_too(app: ASGIApp) -> None:
    sent, (trace, line) = await call(app)
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"])["error"]["status"] == "INTERNAL"
    assert not isinstance(trace["exc_info"], Exception)
    assert (line["status"], line["error"]) == (500, "INTERNAL")


async def test_a_panic_under_a_real_server_is_our_500() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(recorded(panic_in_a_thread), lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve([listener]))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
        answers = [await client.get("/x") for _ in range(2)]
    server.should_exit = True
    await serving
    assert [answer.json()["error"]["status"] for answer in answers] == ["INTERNAL", "INTERNAL"]


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
async def test_what_ends_the_process_or_the_task_is_no_failure_of_a_request(end: type[BaseException]) -> None:
    async def ended(scope: Scope, receive: Receive, send: Send) -> None:
        raise end

    with pytest.raises(end):
        await call(ended)


@pytest.mark.parametrize("app", [hang_up, stop_in_the_middle])
async def test_an_answer_without_an_end_means_that_the_client_went_away(app: ASGIApp) -> None:
    _, (line,) = await call(app)
    assert (line["status"], line["error"]) == (499, "CANCELLED")


async def test_an_exception_in_the_middle_of_an_answer_cuts_it_off() -> None:
    sent, (_, line) = await call(explode_in_the_middle)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert line["status"] == 500

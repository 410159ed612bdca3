"""The server's life on a real port: it serves, drains, tells what it cuts off, and ends."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from support.fakes import INFO, tokenizer_folder

from engine.api.engine import EngineState, Health, ModelInfo
from engine.api.events import CandidateFinished, Delta, ErrorKind, Event, FinishReason, RequestError, RequestFinished
from engine.api.requests import Request
from server.app import create_app
from server.commands.terminal import say_ready, watch_loading
from server.config.errors import ConfigError
from server.config.models_file import ModelSpec
from server.config.settings import Settings
from server.convert.chat_tokenizer import ChatTokenizer
from server.http import serving
from server.http.serving import CastorServer, bind
from server.models.registry import Registry

SECONDS = 60.0
BODY = {"contents": [{"parts": [{"text": "hi"}]}]}
STREAM = "/v1beta/models/tiny:streamGenerateContent?alt=sse"

STRANGE_HEADS = [
    b"OPTIONS * HTTP/1.1\r\nhost: localhost",
    b"CONNECT example.org:443 HTTP/1.1\r\nhost: localhost",
    b"GET http://[::1/ HTTP/1.1\r\nhost: localhost",
    b"GET http://evil.org/v1/models HTTP/1.1\r\nhost: evil.org",
    b"GET /v1beta/models/\xff\xfe HTTP/1.1\r\nhost: localhost",
    b"GET /v1beta/models/%ff%00%0a:x HTTP/1.1\r\nhost: localhost",
    b"GET /?key=\xff%ff HTTP/1.1\r\nhost: localhost",
    b"GET /v1/models?pageToken=%ff&\xc3( HTTP/1.1\r\nhost: localhost",
    b"GET /x HTTP/1.1\r\nhost: [::1",
    b"GET /x HTTP/1.1\r\nhost: \xff\xfe",
    b"GET /x HTTP/1.1\r\nhost: localhost:99999999",
    b"GET /x HTTP/1.1\r\nhost: localhost:x",
    b"GET /x HTTP/1.1\r\nhost: localhost\r\norigin: http://[",
    b"GET /x HTTP/1.1",
    b"GET /x HTTP/1.0",
    b"GET /x HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade",
    b"GET /x HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer \xff",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"POST /v1beta/models/tiny:generateContent HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1",
    b"POST /v1beta/models/tiny:generateContent HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: gzip",
]


class PatientEngine:
    """Says one word, then waits for leave to go on; closed, it ends what is open with its terminal error."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.leave = asyncio.Event()
        self.closing = False

    def describe(self) -> ModelInfo:
        return INFO

    async def ready(self) -> ModelInfo:
        return INFO

    async def submit(self, request: Request) -> AsyncIterator[Event]:  # type: ignore[override]
        self.begun.set()
        yield Delta(0, (1,), "one")
        await self.leave.wait()
        if self.closing:
            yield CandidateFinished(0, FinishReason.ABORTED, 1)
            error = RequestError(ErrorKind.UNAVAILABLE, "shutting down")
            yield RequestFinished(len(request.prompt), 0, 1, error)
            return
        yield CandidateFinished(0, FinishReason.STOP, 1)
        yield RequestFinished(len(request.prompt), 0, 1)

    def room(self) -> int:
        return 1000

    def cancel(self, request_id: str) -> None:
        self.leave.set()

    def health(self) -> Health:
        return Health(EngineState.STOPPED if self.closing else EngineState.READY)

    async def close(self) -> None:
        self.closing = True
        self.leave.set()


class Running:
    """A server in this loop, its engine, and what it says to humans."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.settings = replace(Settings(folder, folder, port=0), **options)
        self.engine: Any = PatientEngine()
        self.listener = bind(self.settings)
        self.port = int(self.listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.words = StringIO()
        self.ready = asyncio.Event()
        spec = ModelSpec("tiny", str(folder), aliases=("gemini-*",))
        self.registry = Registry(
            [spec], folder, start_engine=lambda config, name: self.engine, read_tokenizer=ChatTokenizer
        )
        app = create_app(self.settings, self.registry)
        draining = app.state.services.draining
        self.server = CastorServer(app, self.settings, self._announce, draining.set, self.registry.close)

    async def _announce(self, server: CastorServer) -> None:
        terminal = Console(file=self.words, width=80)
        assert await watch_loading(self.registry, terminal)
        say_ready(self.registry, self.settings, self.port, terminal)
        self.ready.set()

    def end(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)


@asynccontextmanager
async def running(folder: Path, **options: Any) -> AsyncIterator[tuple[Running, httpx.AsyncClient]]:
    """A ready server; afterwards it has ended by itself or been asked to."""
    state = Running(tokenizer_folder(folder), **options)
    life = asyncio.create_task(state.server.serve([state.listener]))
    async with asyncio.timeout(SECONDS), httpx.AsyncClient(base_url=state.url, timeout=SECONDS) as client:
        await state.ready.wait()
        yield state, client
        state.end()
        state.engine.leave.set()
        await life


async def until_refused(port: int) -> None:
    """Wait for the listener to close, which it does at the server's next tick."""
    async with asyncio.timeout(60):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                return
            writer.close()
            await asyncio.sleep(0.02)


async def test_it_says_where_it_is_and_what_to_try(tmp_path: Path) -> None:
    async with running(tmp_path) as (state, client):
        assert (await client.get("/readyz")).json()["status"] == "ready"
        said = state.words.getvalue()
    assert f"Castor is ready on {state.url}" in said
    assert "tiny (also as gemini-*)" in said
    (line,) = [line for line in said.splitlines() if "curl" in line]
    assert f"{state.url}/v1beta/models/tiny:generateContent" in line
    assert json.loads(line.split("-d '")[1].rstrip("'"))["contents"]


async def test_what_ends_within_the_drain_ends_well(tmp_path: Path) -> None:
    async with (
        running(tmp_path, drain_seconds=SECONDS) as (state, client),
        client.stream("POST", STREAM, json=BODY) as answer,
    ):
        lines = answer.aiter_lines()
        assert "one" in await anext(lines)
        state.end()
        await until_refused(state.port)
        state.engine.leave.set()
        rest = "".join([line async for line in lines])
    assert "STOP" in rest
    assert "error" not in rest
    assert state.server.exit_code == 0


async def test_a_whole_answer_ends_well_within_the_drain_too(tmp_path: Path) -> None:
    async with running(tmp_path, drain_seconds=SECONDS) as (state, client):
        asking = asyncio.create_task(client.post("/v1beta/models/tiny:generateContent", json=BODY))
        await state.engine.begun.wait()
        state.end()
        await until_refused(state.port)
        state.engine.leave.set()
        answer = (await asking).json()
    assert answer["candidates"][0]["finishReason"] == "STOP"


async def test_what_is_left_after_the_drain_gets_its_terminal_error(tmp_path: Path) -> None:
    async with (
        running(tmp_path, drain_seconds=0.1) as (state, client),
        client.stream("POST", STREAM, json=BODY) as answer,
    ):
        lines = answer.aiter_lines()
        assert "one" in await anext(lines)
        state.end()
        events = [json.loads(line.removeprefix("data: ")) async for line in lines if line.startswith("data: ")]
    assert events[-1]["error"]["status"] == "UNAVAILABLE"
    assert state.server.exit_code == 0


async def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exits: list[int] = []
    monkeypatch.setattr(serving.os, "_exit", exits.append)
    state = Running(tokenizer_folder(tmp_path))
    state.server.handle_exit(signal.SIGINT, None)
    assert exits == []
    state.server.handle_exit(signal.SIGTERM, None)
    assert exits == [], "a manager that repeats itself does not cut the drain short"
    state.server.handle_exit(signal.SIGINT, None)
    assert exits == [130]
    state.listener.close()


@pytest.mark.parametrize("keys", [(), ("sesame",)])
async def test_no_head_is_a_server_error(tmp_path: Path, keys: tuple[str, ...]) -> None:
    async with running(tmp_path, api_keys=keys) as (state, client):
        for head in STRANGE_HEADS:
            reader, writer = await asyncio.open_connection("127.0.0.1", state.port)
            writer.write(head + b"\r\nconnection: close\r\n\r\n")
            answer = await reader.readline()
            writer.close()
            assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501")), (head, answer)
        assert (await client.get("/healthz")).status_code == 200


def test_bind_says_what_is_wrong(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Settings(tmp_path, tmp_path, port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match="is in use"):
            bind(settings)
    with pytest.raises(ConfigError, match="cannot listen on"):
        bind(Settings(tmp_path, tmp_path, host="203.0.113.1", port=0))

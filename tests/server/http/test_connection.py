"""A connection that sends or reads too little, or too much, is ended by the server."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from server.http import connection
from server.http.connection import FED_BYTES, MAX_HEAD_BYTES, BoundedHttp

SECONDS = 60.0
HEAD = b"GET / HTTP/1.1\r\nhost: localhost\r\n"


CHUNKED = b"POST /%s HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"


async def tell(scope: Scope, receive: Receive, send: Send) -> None:
    """``/endless`` sends until nobody listens; ``/read`` tells the length of the body and the number of headers, once
    the body is there; everything else answers at once."""
    if scope["path"] == "/read":
        await scope["whole"].wait()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    with suppress(OSError):
        while scope["path"] == "/endless" and not scope["app_gone"].is_set():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await asyncio.sleep(0)
    told = b"%d %d" % (len(scope["body"]), len(scope["headers"])) if scope["path"] == "/read" else b"hello"
    await send({"type": "http.response.body", "body": told})


class Listening:
    """A server on a free port whose app notices when its client is gone."""

    def __init__(self, listener: socket.socket) -> None:
        self.port = int(listener.getsockname()[1])
        self.gone = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        body, whole = bytearray(), asyncio.Event()

        async def watch() -> None:
            while (message := await receive())["type"] != "http.disconnect":
                body.extend(message["body"])
                if not message["more_body"]:
                    whole.set()
            self.gone.set()
            whole.set()

        watching = asyncio.create_task(watch())
        await tell({**scope, "app_gone": self.gone, "whole": whole, "body": body}, receive, send)
        watching.cancel()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=2**16)


@asynccontextmanager
async def listening() -> AsyncIterator[Listening]:
    listener = socket.create_server(("127.0.0.1", 0))
    app = Listening(listener)
    config = uvicorn.Config(app, http=BoundedHttp, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve([listener]))
    try:
        async with asyncio.timeout(SECONDS):
            yield app
    finally:
        server.should_exit = True
        await serving


async def test_an_ordinary_request_is_answered() -> None:
    async with listening() as app:
        reader, writer = await app.connect()
        for _ in range(2):
            writer.write(HEAD + b"\r\n")
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            await reader.readuntil(b"hello\r\n0\r\n\r\n")
        writer.close()


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"GET / HT", HEAD, HEAD + b"x: " + b"y" * 5000])
async def test_a_head_that_does_not_come_ends_the_connection(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.1)
    async with listening() as app:
        reader, writer = await app.connect()
        writer.write(sent)
        assert await reader.read() == b""
        writer.close()


async def test_the_clock_runs_for_the_second_head_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 1.0)
    async with listening() as app:
        reader, writer = await app.connect()
        writer.write(HEAD + b"\r\n")
        await reader.readuntil(b"hello\r\n0\r\n\r\n")
        writer.write(b"\r\n")
        assert await reader.read() == b""
        writer.close()


async def test_a_head_without_end_is_refused() -> None:
    async with listening() as app:
        reader, writer = await app.connect()
        writer.write(HEAD)
        writer.write(b"x-long: " + b"y" * MAX_HEAD_BYTES)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431 ")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert json.loads(await reader.readexactly(length))["error"]["code"] == 431
        writer.close()


async def test_a_client_that_never_reads_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.2)
    async with listening() as app:
        _, writer = await app.connect()
        writer.write(HEAD.replace(b"/ HTTP", b"/endless HTTP") + b"\r\n")
        await app.gone.wait()
        writer.close()


async def test_the_rest_of_a_body_that_nobody_reads_is_not_taken_for_a_head() -> None:
    async with listening() as app:
        reader, writer = await app.connect()
        size = 4 * MAX_HEAD_BYTES
        writer.write(b"POST" + HEAD.removeprefix(b"GET") + b"content-length: %d\r\n\r\n" % size)
        await reader.readuntil(b"hello\r\n0\r\n\r\n")
        writer.write(b"x" * size)
        writer.write(HEAD + b"\r\n")
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        writer.close()


async def test_the_rest_of_a_body_that_nobody_reads_must_come_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 1.0)
    async with listening() as app:
        reader, writer = await app.connect()
        writer.write(b"POST" + HEAD.removeprefix(b"GET") + b"content-length: 10\r\n\r\nx")
        await reader.readuntil(b"hello\r\n0\r\n\r\n")
        assert await reader.read() == b""
        writer.close()


async def test_small_trailers_and_extensions_are_no_headers_of_the_request() -> None:
    async with listening() as app:
        reader, writer = await app.connect()
        for _ in range(2):
            writer.write(CHUNKED % b"read" + b"3;a=b\r\nabc\r\n2\r\nde\r\n0\r\nx-sum: 1\r\nx-goog-api-key: k\r\n\r\n")
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readuntil(b"\r\n0\r\n\r\n") == b"3\r\n5 2\r\n0\r\n\r\n"
        writer.close()


TOO_MANY = MAX_HEAD_BYTES + FED_BYTES
BESIDE_BODY = {
    "trailers": b"0\r\n" + b"x: y\r\n" * (TOO_MANY // 6 + 1),
    "one trailer": b"0\r\nx: " + b"y" * TOO_MANY,
    "the name of a trailer": b"0\r\n" + b"y" * TOO_MANY,
    "an extension": b"1;" + b"y" * TOO_MANY,
}


@pytest.mark.parametrize("sent", BESIDE_BODY.values(), ids=BESIDE_BODY)
async def test_what_stands_beside_a_body_is_bounded(sent: bytes) -> None:
    async with listening() as app:
        reader, writer = await app.connect()
        writer.write(CHUNKED % b"read" + b"3\r\nabc\r\n" + sent)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431 ")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert json.loads(await reader.readexactly(length))["error"]["code"] == 431
        await app.gone.wait()
        writer.close()


@pytest.mark.parametrize("sent", BESIDE_BODY.values(), ids=BESIDE_BODY)
async def test_it_is_bounded_too_where_the_answer_has_ended(sent: bytes) -> None:
    async with listening() as app:
        reader, writer = await app.connect()
        writer.write(CHUNKED % b"")
        await reader.readuntil(b"hello\r\n0\r\n\r\n")
        writer.write(sent)
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()


async def test_a_body_in_very_small_chunks_is_read() -> None:
    async with listening() as app:
        reader, writer = await app.connect()
        writer.write(CHUNKED % b"read" + b"000001;x\r\na\r\n" * MAX_HEAD_BYTES + b"0\r\n\r\n")
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        assert f"{MAX_HEAD_BYTES} 2".encode() in await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.close()


async def test_a_head_without_end_behind_a_running_answer_ends_both() -> None:
    async with listening() as app:
        reader, writer = await app.connect()
        writer.write(HEAD.replace(b"/ HTTP", b"/endless HTTP") + b"\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD + b"x: ")
        writer.write(b"y" * TOO_MANY)
        with suppress(ConnectionResetError):
            while piece := await reader.read(2**16):
                assert b"431" not in piece
        await app.gone.wait()
        writer.close()


async def test_a_connection_does_not_rest_after_a_body_that_nobody_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening() as app:
        reader, writer = await app.connect()
        writer.write(b"POST" + HEAD.removeprefix(b"GET") + b"content-length: 10\r\n\r\n")
        await reader.readuntil(b"hello\r\n0\r\n\r\n")
        monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
        writer.write(b"x" * 10 + b"GET / HT")
        assert await reader.read() == b""
        writer.close()


OFFERS = {
    "java's HttpClient": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n",
    "ktor": b"upgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\nconnection: keep-alive, upgrade\r\n",
    "websocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
    "tls": b"Connection: Upgrade\r\nUpgrade: TLS/1.0, HTTP/2.0\r\n",
}
FRAMINGS = {
    "length": (b"content-length: 5\r\n", b"abcde"),
    "chunked": (b"transfer-encoding: chunked\r\n", b"2\r\nab\r\n3;x=y\r\ncde\r\n0\r\nx-sum: 1\r\n\r\n"),
}


@pytest.mark.parametrize("step", [1, 7, 100_000])
@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("offer", OFFERS)
async def test_an_offer_to_upgrade_is_ignored_and_the_body_read(offer: str, framing: str, step: int) -> None:
    header, body = FRAMINGS[framing]
    request = b"POST /read HTTP/1.1\r\nhost: localhost\r\n" + OFFERS[offer] + header + b"\r\n" + body
    async with listening() as app:
        reader, writer = await app.connect()
        for _ in range(2):  # the connection goes on
            for start in range(0, len(request), step):
                writer.write(request[start : start + step])
                await writer.drain()
                await asyncio.sleep(0)
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            answer = await reader.readuntil(b"\r\n0\r\n\r\n")
            assert answer.split(b"\r\n")[1].startswith(b"5 ")
        writer.close()


async def test_an_offer_without_a_body_is_ignored_too() -> None:
    async with listening() as app:
        reader, writer = await app.connect()
        writer.write((HEAD + OFFERS["websocket"] + b"\r\n") * 200)
        for _ in range(200):
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            await reader.readuntil(b"hello\r\n0\r\n\r\n")
        writer.close()


async def test_a_head_with_an_offer_is_bounded() -> None:
    async with listening() as app:
        reader, writer = await app.connect()
        writer.write(HEAD + OFFERS["ktor"] + b"x-long: " + b"y" * MAX_HEAD_BYTES)
        assert (await reader.read()).startswith(b"HTTP/1.1 431 ")
        writer.close()


@pytest.mark.parametrize("path", [b"/", b"/read"])
async def test_a_client_of_http_1_0_gets_a_body_that_ends_with_the_connection(path: bytes) -> None:
    async with listening() as app:
        reader, writer = await app.connect()
        writer.write(b"POST %s HTTP/1.0\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\nabc" % path)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"transfer-encoding" not in head
        assert b"connection: close" in head
        assert body == (b"hello" if path == b"/" else b"3 2")
        writer.close()


async def test_a_client_that_waits_for_leave_gets_it() -> None:
    async with listening() as app:
        reader, writer = await app.connect()
        writer.write(b"POST /read HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"abc")
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        assert await reader.readuntil(b"\r\n0\r\n\r\n") == b"3\r\n3 3\r\n0\r\n\r\n"
        writer.close()


NO_HTTP = {
    "tls": bytes.fromhex("160301020001000001fc0303"),
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "tunnel": b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com:443\r\n\r\n",
    "noise": b"hello\r\n\r\n",
    "a bad chunk": CHUNKED % b"read" + b"xyz\r\n",
}


@pytest.mark.parametrize("sent", NO_HTTP.values(), ids=NO_HTTP)
async def test_what_is_no_request_is_refused_in_the_words_of_the_api(sent: bytes) -> None:
    async with listening() as app:
        reader, writer = await app.connect()
        writer.write(sent)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["status"] == "INVALID_ARGUMENT"
        writer.close()


async def test_noise_after_a_request_does_not_get_into_its_answer() -> None:
    async with listening() as app:
        reader, writer = await app.connect()
        writer.write(HEAD.replace(b"/ HTTP", b"/endless HTTP") + b"\r\n")
        await reader.readexactly(1000)
        writer.write(b"noise\r\n\r\n")
        with suppress(ConnectionResetError):
            while piece := await reader.read(2**16):
                assert b" 400 " not in piece
        await app.gone.wait()
        writer.close()

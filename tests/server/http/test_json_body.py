"""Bytes to JSON and back."""

from __future__ import annotations

import asyncio
import csv
import gzip
import io
import itertools
import json
import math
import socket
from collections.abc import Iterable
from contextlib import aclosing, suppress

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message

from server.errors import ApiError, InvalidArgument, PayloadTooLarge, RequestTimeout
from server.http import json_body
from server.http.connection import BoundedHttp
from server.http.error_response import api_error_response
from server.http.json_body import (
    MAX_CONTAINERS,
    MAX_VALUES,
    UNWANTED_BYTES,
    parse_json,
    read_away,
    read_body,
    received,
    to_json,
)
from server.http.unpacking import PIECE_BYTES

SECONDS = 60.0
ENDLESS = 1e6


def request(*chunks: bytes, **headers: str) -> Request:
    sent = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages = iter([*sent, {"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Message:
        return next(messages)

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": named}, receive)


def dripping(pieces: Iterable[bytes], seconds: float) -> Request:
    """A body of which the first piece is there and the others come with pauses."""
    left = iter(pieces)
    begun = False

    async def receive() -> Message:
        nonlocal begun
        await asyncio.sleep(seconds if begun else 0)
        begun = True
        piece = next(left, None)
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    return Request({"type": "http", "headers": []}, receive)


async def test_chunks_are_joined() -> None:
    assert await read_body(request(b'{"a"', b": [1, ", b"2.5]}"), 100) == b'{"a": [1, 2.5]}'
    assert await read_body(request(), 100) == b""


async def test_the_limit_is_in_bytes_and_exact() -> None:
    assert len(await read_body(request(b'"', b"x" * 98, b'"'), 100)) == 100
    with pytest.raises(PayloadTooLarge, match="100 bytes"):
        await read_body(request(b'"', b"x" * 99, b'"'), 100)
    with pytest.raises(PayloadTooLarge):
        await read_body(request(content_length="101"), 100)


async def test_the_limit_counts_what_was_unpacked() -> None:
    packed = gzip.compress(b" " * 1000)
    assert len(await read_body(request(packed, content_encoding="gzip"), 1000)) == 1000
    with pytest.raises(PayloadTooLarge, match="999 bytes"):
        await read_body(request(packed, content_encoding="gzip"), 999)


async def test_a_small_body_that_unpacks_without_end_keeps_nobody_waiting() -> None:
    bomb = gzip.compress(bytes(50_000_000))
    reading = asyncio.create_task(read_body(request(bomb, content_encoding="gzip"), 10**9))
    turns = 0
    while not reading.done():
        await asyncio.sleep(0)
        turns += 1
    assert len(reading.result()) == 50_000_000
    assert turns > 50_000_000 / PIECE_BYTES


async def test_a_body_has_its_time_in_all_however_steadily_it_comes() -> None:
    with pytest.raises(RequestTimeout, match=r"not complete after 0\.3 seconds; send it faster"):
        await read_body(dripping(itertools.repeat(b" "), 0.01), 10**9, total_seconds=0.3)


async def test_a_file_has_the_time_that_its_bytes_need() -> None:
    async def size(pieces: Iterable[bytes], least_rate: float) -> int:
        coming = received(dripping(pieces, 0.01), SECONDS, 0.3, least_rate)
        async with aclosing(coming):
            return sum([len(piece) async for piece in coming])

    assert await size([b"x" * 1000] * 100, least_rate=10) == 100_000
    with pytest.raises(RequestTimeout, match=r"after 0\.3 seconds at least 1000 bytes a second"):
        await size(itertools.repeat(b"x"), least_rate=1000)


async def test_a_client_that_drips_is_told_and_its_connection_is_closed() -> None:
    async def read(request: Request) -> Response:
        try:
            await read_body(request, 10**9, total_seconds=0.3)
        except ApiError as failure:
            return api_error_response(request, failure)
        return Response()

    application = Starlette(routes=[Route("/", read, methods=["POST"])])
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application, http=BoundedHttp, lifespan="off", log_config=None))
    serving = asyncio.create_task(server.serve([listener]))

    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"1\r\n \r\n")
            await asyncio.sleep(0.01)

    async with asyncio.timeout(SECONDS):
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        dropping = asyncio.create_task(drip(writer))
        head = await reader.readuntil(b"\r\n\r\n")
        with suppress(ConnectionResetError):
            while await reader.read(4096):
                pass
        dropping.cancel()
        writer.close()
        server.should_exit = True
        await serving
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head


async def test_the_beginning_of_an_unwanted_body_is_read_away() -> None:
    pieces = [b"x" * 65536] * 100
    left = iter(pieces)
    await read_away(dripping(left, 0))
    assert len(pieces) - len(list(left)) == UNWANTED_BYTES // 65536 + 1

    left = iter(pieces[:3])
    await read_away(dripping(left, 0))
    assert not list(left)


async def test_an_unwanted_body_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_body, "UNWANTED_SECONDS", 0.1)
    async with asyncio.timeout(SECONDS):
        await read_away(dripping(itertools.repeat(b"x"), ENDLESS))
        waits_for_leave = Request({"type": "http", "headers": [(b"expect", b"100-continue")]})
        await read_away(waits_for_leave)


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"{'a': 1}}",
        b"\xff",
        b"NaN",
        b"[-Infinity]",
        b"[1e999]",
        b'"\\ud800"',
        b'["\\uDFFF"]',
        b"9" * 5000,
        b"[" * 10**6,
    ],
)
def test_what_is_not_json(raw: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"^Invalid JSON payload received\."):
        parse_json(raw)


def test_pairs_of_surrogates_are_a_character() -> None:
    assert parse_json(b'"\\ud83d\\ude00"') == "😀"


def test_json_goes_out_as_ascii() -> None:
    assert to_json({"a": "\u2028😀"}) == '{"a":"\\u2028\\ud83d\\ude00"}'
    with pytest.raises(ValueError, match="Out of range"):
        to_json(float("nan"))


def test_an_empty_body_is_an_empty_message() -> None:
    assert parse_json(b"") == parse_json(b" \n") == {}


def test_brackets_count_only_as_containers() -> None:
    text = b'["' + b"{[" * MAX_CONTAINERS + b'"]'
    assert len(parse_json(text)[0]) == 2 * MAX_CONTAINERS
    fits = b"[" + b"{}," * (MAX_CONTAINERS - 2) + b"{}]"
    assert len(parse_json(fits)) == MAX_CONTAINERS - 1
    with pytest.raises(InvalidArgument, match="100001 objects"):
        parse_json(fits[:-1] + b",{}]")


def test_the_number_of_values_is_bounded() -> None:
    fits = b"[" + b"1," * (MAX_VALUES - 1) + b"1]"
    assert len(parse_json(fits)) == MAX_VALUES
    with pytest.raises(InvalidArgument, match=f"more than {MAX_VALUES} values"):
        parse_json(fits[:-1] + b",1]")
    keys = b"{" + b",".join(b'"%d":""' % key for key in range(MAX_VALUES)) + b"}"
    assert len(parse_json(keys)) == MAX_VALUES
    with pytest.raises(InvalidArgument, match=f"more than {MAX_VALUES} values"):
        parse_json(keys[:-1] + b',"x":""}')


def test_a_body_of_quotes_is_not_taken_apart() -> None:
    with pytest.raises(InvalidArgument, match=f"more than {MAX_VALUES} values"):
        parse_json(b"[" + b'"",' * (3 * MAX_VALUES) + b"1]")


def test_commas_count_only_outside_of_texts() -> None:
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerows([["a,b", 'say "yes"', "back\\", '\\"', "{[", index] for index in range(150_000)])
    for ascii_only in (True, False):
        body = json.dumps({"contents": table.getvalue(), "x": ["\\", "\\\\", '\\"', "ü"]}, ensure_ascii=ascii_only)
        assert body.count(",") > MAX_VALUES
        assert parse_json(body.encode())["contents"] == table.getvalue()


def test_what_is_read_of_a_large_body_is_what_json_says() -> None:
    body = b'{"a": 1, "b": [' + b'"x", ' * 99_000 + b'1e3], "a": "last wins"}'
    assert parse_json(body) == json.loads(body)
    assert math.isclose(parse_json(body)["b"][-1], 1000)

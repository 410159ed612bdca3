"""Bytes to JSON and back."""

from __future__ import annotations

import pytest
from starlette.requests import Request
from starlette.types import Message

from server.body import MAX_CONTAINERS, parse_json, read_body, to_json
from server.errors import InvalidArgument, PayloadTooLarge


def request(*chunks: bytes, **headers: str) -> Request:
    sent = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages = iter([*sent, {"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Message:
        return next(messages)

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": named}, receive)


async def test_chunks_are_joined() -> None:
    assert await read_body(request(b'{"a"', b": [1, ", b"2.5]}"), 100) == b'{"a": [1, 2.5]}'
    assert await read_body(request(), 100) == b""


async def test_the_limit_is_in_bytes_and_exact() -> None:
    assert len(await read_body(request(b'"', b"x" * 98, b'"'), 100)) == 100
    with pytest.raises(PayloadTooLarge, match="100 bytes"):
        await read_body(request(b'"', b"x" * 99, b'"'), 100)
    with pytest.raises(PayloadTooLarge):
        await read_body(request(content_length="101"), 100)


async def test_an_encoded_body_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match="gzip"):
        await read_body(request(b"{}", content_encoding="gzip"), 100)


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"{'a': 1}",
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

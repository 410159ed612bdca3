"""The bytes of a request as JSON, within limits; JSON going out."""

from __future__ import annotations

import asyncio
import io
import json
import math
import re
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any, NoReturn

from starlette.requests import Request
from starlette.responses import Response

from server.errors import InvalidArgument, PayloadTooLarge, RequestTimeout
from server.http.relaxed_json import read_relaxed
from server.http.unpacking import Unpacker

MAX_CONTAINERS = 100_000
MAX_VALUES = 100_000
"""Reading as many names takes some 50 ms, which blocks every other request of the process."""
STALL_SECONDS = 60.0
TOTAL_SECONDS = 300.0
UNWANTED_BYTES = 1024 * 1024
UNWANTED_SECONDS = 10.0
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_NO_STRUCTURE = bytes(set(range(256)) - set(b'",[{'))
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_MALFORMED = "Invalid JSON payload received. "


async def received(
    request: Request,
    stall_seconds: float = STALL_SECONDS,
    total_seconds: float = TOTAL_SECONDS,
    least_rate: float = math.inf,
) -> AsyncGenerator[bytes, None]:
    """The body in non-empty pieces as they arrive, unpacked where the client has packed it.

    Raises ``RequestTimeout`` when nothing comes for ``stall_seconds``, and if the body is incomplete after
    ``total_seconds`` plus the time that its bytes so far need at ``least_rate``, in bytes a second, as they are sent;
    ``InvalidArgument`` for a body that cannot be unpacked.
    """
    unpacker = Unpacker(request.headers.get("content-encoding", ""))
    began, size = time.monotonic(), 0
    async with aclosing(request.stream()) as pieces:
        while True:
            left = began + total_seconds + size / least_rate - time.monotonic()
            try:
                async with asyncio.timeout(min(stall_seconds, left)):
                    piece = await anext(pieces, None)
            except TimeoutError:
                raise _too_slow(stall_seconds, total_seconds, least_rate, stalled=stall_seconds < left) from None
            if piece is None:
                break
            if left < 0:
                raise _too_slow(stall_seconds, total_seconds, least_rate, stalled=False)
            size += len(piece)
            for unpacked in filter(None, unpacker.feed(piece)):
                yield unpacked
                if unpacker.encoding:
                    await asyncio.sleep(0)  # a little that is sent may be much to unpack
    if rest := unpacker.end():
        yield rest


async def read_body(
    request: Request, limit: int, stall_seconds: float = STALL_SECONDS, total_seconds: float = TOTAL_SECONDS
) -> bytes:
    """The body, of at most ``limit`` bytes, within ``total_seconds``.

    Raises ``PayloadTooLarge`` as soon as it is known to be longer, and what `received` raises.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    body = io.BytesIO()  # it hands over its bytes without a copy
    async with aclosing(received(request, stall_seconds, total_seconds)) as pieces:
        async for piece in pieces:
            if body.tell() + len(piece) > limit:
                raise _too_large(limit)
            body.write(piece)
    return body.getvalue()


async def read_away(request: Request) -> None:
    """Read the beginning of a body that is not wanted: a client that still sends when its connection is closed may not
    see the answer. One that waits for leave to send does not get it."""
    if "expect" in request.headers:
        return
    size, has_more = 0, True
    with suppress(TimeoutError):
        async with asyncio.timeout(UNWANTED_SECONDS):
            while has_more and size <= UNWANTED_BYTES:
                message = await request.receive()
                size, has_more = size + len(message.get("body", b"")), message.get("more_body", False)


def parse_json(raw: bytes) -> Any:
    """A body as JSON, in the spellings that Google's parser takes; an empty one counts as ``{}``.

    Raises ``InvalidArgument`` for what is not JSON: also NaN, numbers out of range, lone surrogates, nesting that no
    parser should follow, and so many values that reading them would block all other requests, or so many objects that
    checking them would take gigabytes.
    """
    if not raw or raw.isspace():
        return {}
    try:
        _check_size(raw)
        value = json.loads(raw, parse_constant=_no_constant, parse_float=_finite)
        if _SURROGATE_ESCAPE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        try:
            value = read_relaxed(raw, MAX_CONTAINERS, MAX_VALUES)
        except (ValueError, RecursionError):  # nor is it one of the other spellings: what the standard says helps more
            raise InvalidArgument(f"{_MALFORMED}{error}") from None
    except UnicodeError:
        raise InvalidArgument(f"{_MALFORMED}The text is not valid Unicode.") from None
    except RecursionError:
        raise InvalidArgument(f"{_MALFORMED}It is nested too deeply.") from None
    except ValueError as error:
        raise InvalidArgument(f"{_MALFORMED}{error}") from None
    return value


def to_json(value: Any) -> str:
    """One line of ASCII: U+2028 and its like, unescaped, break clients that split lines there."""
    return _ENCODER.encode(value)


def json_response(value: Any, headers: Mapping[str, str] | None = None) -> Response:
    """The HTTP answer with this body."""
    return Response(to_json(value), headers=headers, media_type="application/json")


def _check_size(raw: bytes) -> None:
    """Commas and brackets in texts are distinguished from others only where the bytes alone do not settle it."""
    if raw.count(b",") < MAX_VALUES and raw.count(b"{") + raw.count(b"[") <= MAX_CONTAINERS:
        return
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NO_STRUCTURE)
    # Each value and each key has two quotes at most. More than that is not even split.
    too_many_texts = bare.count(b'"') > 4 * (MAX_VALUES + MAX_CONTAINERS)
    structure = b"" if too_many_texts else b"".join(bare.split(b'"')[::2])
    containers = structure.count(b"{") + structure.count(b"[")
    if containers > MAX_CONTAINERS:
        raise ValueError(f"It holds {containers} objects and lists; at most {MAX_CONTAINERS} are read.")
    if too_many_texts or structure.count(b",") >= MAX_VALUES:
        raise ValueError(
            f"It holds more than {MAX_VALUES} values; send large data as one text, or upload it as a file."
        )


def _too_slow(stall_seconds: float, total_seconds: float, least_rate: float, *, stalled: bool) -> RequestTimeout:
    if stalled:
        return RequestTimeout(f"Nothing of the body came for {stall_seconds:g} seconds; send it without pauses.")
    if math.isinf(least_rate):
        return RequestTimeout(f"The body was not complete after {total_seconds:g} seconds; send it faster.")
    return RequestTimeout(
        f"The body came too slowly: after {total_seconds:g} seconds at least {least_rate:g} bytes a second are "
        "expected. The received bytes of a resumable upload are kept: query its offset and continue from there."
    )


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"Request payload size exceeds the limit: {limit} bytes.")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value.")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"The number {text[:64]} is out of range.")
    return number

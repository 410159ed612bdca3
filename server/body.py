"""The bytes of a request as JSON, within limits; JSON going out."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NoReturn

from starlette.requests import Request

from server.errors import InvalidArgument, PayloadTooLarge, RequestTimeout

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
MAX_CONTAINERS = 100_000
STALL_SECONDS = 60.0
_MALFORMED = "Invalid JSON payload received. "


async def received(request: Request, stall_seconds: float = STALL_SECONDS) -> AsyncGenerator[bytes, None]:
    """The body in the pieces in which it comes, none of them empty.

    Raises ``RequestTimeout`` when nothing comes for ``stall_seconds``, and ``InvalidArgument`` for a body that is
    encoded.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise InvalidArgument(f"Content-Encoding {encoding!r} is not accepted; send the body as it is")
    async with aclosing(request.stream()) as pieces:
        while True:
            try:
                async with asyncio.timeout(stall_seconds):
                    piece = await anext(pieces, None)
            except TimeoutError:
                raise RequestTimeout(
                    f"Nothing of the body came for {stall_seconds:g} seconds; send it without pauses."
                ) from None
            if piece is None:
                return
            if piece:
                yield piece


async def read_body(request: Request, limit: int, stall_seconds: float = STALL_SECONDS) -> bytes:
    """The body, of at most ``limit`` bytes. Raises ``PayloadTooLarge`` as soon as it is known to be longer, and what
    `received` raises."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    chunks = bytearray()
    async with aclosing(received(request, stall_seconds)) as pieces:
        async for piece in pieces:
            chunks += piece
            if len(chunks) > limit:
                raise _too_large(limit)
    return bytes(chunks)


def parse_json(raw: bytes) -> Any:
    """A body as JSON; an empty one counts as ``{}``.

    Raises ``InvalidArgument`` for what is not JSON: also NaN, numbers out of range, lone surrogates, nesting that no
    parser should follow, and so many objects that checking them would take gigabytes.
    """
    if not raw.strip():
        return {}
    try:
        value = json.loads(raw, parse_constant=_no_constant, parse_float=_finite)
        if _SURROGATE_ESCAPE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
        _check_containers(raw, value)
    except json.JSONDecodeError as error:
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
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _check_containers(raw: bytes, value: Any) -> None:
    """Brackets in texts are counted only where the bytes alone do not settle it."""
    if raw.count(b"{") + raw.count(b"[") <= MAX_CONTAINERS:
        return
    count, left = 0, [value]
    while left:
        found = left.pop()
        if isinstance(found, (dict, list)):
            count += 1
            left += found.values() if isinstance(found, dict) else found
    if count > MAX_CONTAINERS:
        raise ValueError(f"It holds {count} objects and lists; at most {MAX_CONTAINERS} are read.")


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"Request payload size exceeds the limit: {limit} bytes.")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value.")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"The number {text[:64]} is out of range.")
    return number

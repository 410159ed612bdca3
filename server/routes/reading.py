"""Passes an HTTP request on a model to the pipeline; the headers that such requests share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from starlette.requests import Request

from server.errors import InvalidArgument
from server.generation.pipeline import Caller, Incoming, time_limit
from server.http.json_body import parse_json, read_body
from server.http.streaming import until_hangup
from server.models.registry import Entry
from server.services import Services
from server.wire.message import parse
from server.wire.requests import CountTokensRequest, GenerateContentRequest

IGNORED_HEADER = "x-castor-ignored"
MAX_IGNORED_CHARACTERS = 4000
MAX_TIMEOUT = 86_400.0
T = TypeVar("T")


async def read_as(
    kind: type[GenerateContentRequest] | type[CountTokensRequest],
    request: Request,
    services: Services,
    entry: Entry,
    prepare: Callable[[Incoming, Entry, Caller, float], Coroutine[Any, Any, T]],
    place: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> T:
    """What ``prepare``, a method of the pipeline, makes of the body as a message of this ``kind``. It has the seconds
    of ``X-Server-Timeout``, else of the model's entry, and ends when the client hangs up.

    It works within ``place``, which begins as soon as the body is there: of many requests that come in one turn of the
    event loop, each knows how many came before it. Raises ``ApiError``, ``EngineUnavailable``, ``ClientDisconnect`` and
    what ``place`` raises.
    """
    settings = services.settings
    seconds = entry.spec.request_timeout
    if (header := request.headers.get("x-server-timeout")) is not None:
        try:
            seconds = float(header)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds <= MAX_TIMEOUT:
            raise InvalidArgument(
                f"X-Server-Timeout is {header[:64]!r}, but must be seconds, above 0 and at most 86400"
            )
    deadline = time.monotonic() + seconds
    async with time_limit(deadline):
        message = Incoming(
            await read_body(request, settings.max_body_bytes, settings.body_stall_seconds, settings.body_seconds),
            lambda raw: parse(kind, parse_json(raw)),
        )
    caller = Caller(request.state.identity, request.state.record.ignored)
    with place():
        return await until_hangup(request.receive, prepare(message, entry, caller, deadline))


def ignored_header(ignored: Sequence[str]) -> dict[str, str]:
    """The header that names the fields of a request that were accepted without effect, or the first of them."""
    named, left = list[str](), MAX_IGNORED_CHARACTERS
    for path in dict.fromkeys(ignored):
        left -= len(path) + 2
        if left < 0:
            break
        named.append(path)
    more = len(dict.fromkeys(ignored)) - len(named)
    return {IGNORED_HEADER: ", ".join(named) + (f", and {more} more" if more else "")} if ignored else {}

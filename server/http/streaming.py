"""Streams on the wire: the two framings, keep-alives, errors after the first byte, and clients that hang up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import as_api_error, error_json
from server.http.json_body import to_json
from server.observability.logs import log
from server.observability.request_record import RequestRecord

T = TypeVar("T")
Chunk = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Framing:
    """How JSON objects follow each other in a body. ``repeats_errors``: after the last item, an error, it comes once
    more as a bare object."""

    media_type: str
    opening: str = ""
    before: str = ""
    between: str = ""
    after: str = ""
    closing: str = ""
    repeats_errors: bool = False


SERVER_SENT_EVENTS = Framing("text/event-stream", before="data: ", after="\n\n", repeats_errors=True)
"""The SDKs for Python and Java and the AI SDK read an error from an event, those for JavaScript and Go only from the
bare object, with which Google ends a stream."""
JSON_ARRAY = Framing("application/json", opening="[", between=",\n", closing="]")
KEEP_ALIVE = " "
"""White space within the next event, before its JSON: the only filler that every known parser takes. Those of go-genai,
Firebase, Genkit and the old JavaScript SDK fail over an empty line or a comment between events."""


class StreamedAnswer(Response):
    """Sends chunks as they come. What fails before anything was sent, at most ``keepalive`` seconds, is raised and gets
    its HTTP status; later failures become the last item of the body.

    A keep-alive begins the item that comes next, so a stream that ends in a silence ends with an empty item.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[Chunk, None],
        framing: Framing,
        keepalive: float,
        record: RequestRecord,
        headers: Mapping[str, str],
    ) -> None:
        quiet = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers={**quiet, **headers}, media_type=framing.media_type)
        del self.headers["content-length"]
        self._chunks = chunks
        self._framing = framing
        self._keepalive = keepalive
        self._record = record
        self._items = 0
        self._begun = False
        self._item_begun = False
        self._sent_at = time.monotonic()
        self._sending = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's shape
        await until_hangup(receive, self._answer(send))

    async def _answer(self, send: Send) -> None:
        pulse = asyncio.create_task(self._pulse(send))
        try:
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    await self._send_item(send, to_json(chunk))
        except Exception as failure:  # the boundary: the status is sent, so the body must carry the error
            if not self._begun:
                raise
            error = as_api_error(failure)
            if error is not failure:
                log.error("stream broke", request=self._record.id, exc_info=failure)
            self._record.failed(error)
            await self._send_item(send, error_json(error))
            if self._framing.repeats_errors:  # in a piece of its own, which is parsed alone where pieces are
                await self._send(send, error_json(error))
        else:
            if self._item_begun:
                await self._send_item(send, "{}")
        finally:
            pulse.cancel()
        await self._send(send, self._framing.closing, more=False)

    async def _pulse(self, send: Send) -> None:
        """Send keep-alives in silences. A task beside the stream costs nothing per chunk, unlike a timeout around
        each."""
        while True:
            await asyncio.sleep(self._keepalive - (time.monotonic() - self._sent_at))
            async with self._sending:
                if time.monotonic() - self._sent_at >= self._keepalive:
                    await self._write(send, ("" if self._item_begun else self._framing.before) + KEEP_ALIVE)
                    self._item_begun = bool(self._framing.before)

    async def _send_item(self, send: Send, text: str) -> None:
        async with self._sending:
            between = self._framing.between if self._items else ""
            before = "" if self._item_begun else self._framing.before
            self._items, self._item_begun = self._items + 1, False
            await self._write(send, f"{between}{before}{text}{self._framing.after}")

    async def _send(self, send: Send, text: str, *, more: bool = True) -> None:
        async with self._sending:
            await self._write(send, text, more=more)

    async def _write(self, send: Send, text: str, *, more: bool = True) -> None:
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            text = self._framing.opening + text
        await send({"type": "http.response.body", "body": text.encode("ascii"), "more_body": more})
        self._sent_at = time.monotonic()


async def until_hangup(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled as soon as the client goes away. Raises ``ClientDisconnect`` then.

    The request's body must have been read: what comes next from ``receive`` is the disconnect.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.wait([working, watching])


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

"""One HTTP connection that cannot be held for ever: bounded heads, and a clock on reading and on writing.

uvicorn bounds neither the size of a request's head nor the time a client takes to send it or to read the answer. The
body is bounded where it is read.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 30.0
"""How long a head may take, from its first byte (or from the connection) to the empty line; and how long the rest of a
body may take that nobody reads any more, because the request is already answered."""
STALL_SECONDS = 60.0
"""How long a client may leave a full buffer unread before its connection is cut."""

_TOO_LARGE = (
    b'{"error":{"code":431,"message":"The head of the request is over %d bytes.","status":"INVALID_ARGUMENT"}}'
    % MAX_HEAD_BYTES
)


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol with limits on what a stranger can make it wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._in_body = False
        self._read_clock: asyncio.TimerHandle | None = None
        self._write_clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_read_clock()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._read_clock is None and not self._in_body:
            self._expect_head()
        self._head_bytes += len(data)
        super().data_received(data)
        in_head = self._read_clock is not None and not self._in_body
        if in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse_head()

    def on_headers_complete(self) -> None:
        self._stop_read_clock()
        self._in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_read_clock()
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self._in_body:
            self._start_read_clock()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_clock = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_clock is not None:
            self._write_clock.cancel()
            self._write_clock = None
        super().resume_writing()

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._start_read_clock()

    def _start_read_clock(self) -> None:
        self._stop_read_clock()
        self._read_clock = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_read_clock(self) -> None:
        if self._read_clock is not None:
            self._read_clock.cancel()
            self._read_clock = None

    def _refuse_head(self) -> None:
        head = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
        self.transport.write(head + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(_TOO_LARGE) + _TOO_LARGE)
        self.transport.close()

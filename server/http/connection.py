"""One HTTP connection that cannot be held for ever: bounded heads, and a clock on reading and on writing.

uvicorn bounds neither the size of a request's head, of chunk extensions and of trailers, nor the time a client takes to
send a head or to read the answer. The body is bounded where it is read.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
FED_BYTES = 16 * 1024
"""How much of a read the parser gets at once: this much may follow the last byte of a body before it counts."""
HEAD_SECONDS = 30.0
"""How long a head may take, from its first byte (or from the connection) to the empty line; also how long the rest of a
body may take that is no longer read, because the request is already answered."""
STALL_SECONDS = 60.0
"""How long a client may leave a full buffer unread before its connection is cut."""

_TOO_LARGE = (
    b'{"error":{"code":431,"message":"The headers of the request, or the trailers and chunk extensions of its body, '
    b'are over %d bytes: send fewer or shorter ones.","status":"INVALID_ARGUMENT"}}' % MAX_HEAD_BYTES
)


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol with limits on what a stranger can make it wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Since the head began, or since the last byte of the body: the parser keeps a line until it is complete.
        self._bytes_beside_body = 0
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
        for start in range(0, len(data), FED_BYTES):
            self._feed(data[start : start + FED_BYTES])
            if self.transport.is_closing():
                return

    def on_header(self, name: bytes, value: bytes) -> None:
        """Trailers are dropped: nothing uses them, and a header that comes after the body was never checked."""
        if not self._in_body:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._bytes_beside_body = 0
        super().on_body(body)

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

    def _feed(self, data: bytes) -> None:
        if self._read_clock is None and not self._in_body:
            self._expect_head()
        self._bytes_beside_body += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        in_head = self._read_clock is not None and not self._in_body
        if (in_head or self._in_body) and self._bytes_beside_body > MAX_HEAD_BYTES:
            self._refuse()
        elif self._read_clock is None and not self._in_body and self.cycle.response_complete:
            self._expect_head()  # an unread body has ended; no other clock is left

    def _expect_head(self) -> None:
        self._bytes_beside_body = 0
        self._start_read_clock()

    def _start_read_clock(self) -> None:
        self._stop_read_clock()
        self._read_clock = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_read_clock(self) -> None:
        if self._read_clock is not None:
            self._read_clock.cancel()
            self._read_clock = None

    def _refuse(self) -> None:
        """Say why and close, or just cut the connection where another answer has begun or comes first."""
        if self._in_body:
            answering = self.cycle.response_started or bool(self.pipeline)
            self.cycle.disconnected = True
        else:
            answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            self.transport.abort()
            return
        head = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
        self.transport.write(head + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(_TOO_LARGE) + _TOO_LARGE)
        self.transport.close()

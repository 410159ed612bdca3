"""One HTTP connection: every HTTP/1 client is understood, and none can hold it for ever.

uvicorn bounds neither the size of a request's head, of chunk extensions and of trailers, nor the time a client takes to
send a head or to read the answer. The body is bounded where it is read.

It also drops the body of a request that offers an upgrade, which Java's HttpClient and Ktor do with each request over
plain HTTP, and answers HTTP/1.0 in chunks.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES = 64 * 1024
FED_BYTES = 16 * 1024
"""How much of a read the parser gets at once: this much may follow the last byte of a body before it counts."""
HEAD_SECONDS = 30.0
"""How long a head may take, from its first byte (or from the connection) to the empty line; also how long the rest of a
body may take that is no longer read, because the request is already answered."""
STALL_SECONDS = 60.0
"""How long a client may leave a full buffer unread before its connection is cut."""

_TOO_LARGE = (
    f"The headers of the request, or the trailers and chunk extensions of its body, are over {MAX_HEAD_BYTES} bytes: "
    "send fewer or shorter ones."
)
_NO_HTTP = "What was sent is no request of HTTP version 1: use an http:// URL, and neither TLS nor HTTP/2."
_OFFER = frozenset({b"upgrade", b"http2-settings"})


class _CycleOfHttp10(RequestResponseCycle):
    """The answer to a client of HTTP/1.0, which knows no chunks: where the length of the body is not known before, the
    end of the connection ends it (RFC 9112, 6.1 and 6.3)."""

    ends_with_connection = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message["headers"]}
            self.ends_with_connection = b"content-length" not in names
        if self.ends_with_connection:
            self.chunked_encoding = False
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


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
        if self._offers_upgrade():
            return
        super().on_headers_complete()
        self._stop_read_clock()
        self._in_body = True
        if self.scope["http_version"] == "1.0":
            self.cycle.__class__ = _CycleOfHttp10
            self.cycle.waiting_for_100_continue = False  # an interim answer would be taken for the answer

    def on_message_complete(self) -> None:
        if self._offers_upgrade():
            return
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
        self._parse(data)
        if self.transport.is_closing():
            return
        in_head = self._read_clock is not None and not self._in_body
        if (in_head or self._in_body) and self._bytes_beside_body > MAX_HEAD_BYTES:
            self._refuse(b"431 Request Header Fields Too Large", _TOO_LARGE)
        elif self._read_clock is None and not self._in_body and self.cycle.response_complete:
            self._expect_head()  # an unread body has ended; no other clock is left

    def _parse(self, data: bytes) -> None:
        """As uvicorn's ``data_received``, but what offers an upgrade is read again without its offer: a server that
        does not upgrade ignores it (RFC 9110, 7.8), while the parser takes what follows the head for another
        protocol."""
        self._unset_keepalive_if_required()
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                data = self._without_offer() + data[offer.args[0] :] if self._offers_upgrade() else b""
            except httptools.HttpParserError:
                self._refuse(b"400 Bad Request", _NO_HTTP)
                return

    def _without_offer(self) -> bytes:
        """The head that has been read, for a new parser."""
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn
        lines = [name + b": " + value for name, value in self.headers if name not in _OFFER]
        return b"\r\n".join([b"%s %s HTTP/%s" % (method, self.url, version), *lines, b"", b""])

    def _offers_upgrade(self) -> bool:
        """Whether the head that is being read does; CONNECT asks for a tunnel, and its path is refused."""
        return bool(self.parser.should_upgrade()) and self.parser.get_method() != b"CONNECT"

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

    def _refuse(self, status: bytes, message: str) -> None:
        """Say why and close, or just cut the connection where another answer has begun or comes first."""
        if self._in_body:
            answering = self.cycle.response_started or bool(self.pipeline)
            self.cycle.disconnected = True
        else:
            answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            self.transport.abort()
            return
        error = {"code": int(status[:3]), "message": message, "status": "INVALID_ARGUMENT"}
        body = json.dumps({"error": error}, separators=(",", ":")).encode()
        head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\nconnection: close\r\n" % status
        self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()

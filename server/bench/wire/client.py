"""HTTP/1.1 as a load generator needs it: one POST on a connection of its own, and the body piece by piece as it comes.

It shares the machine with the server that it measures, so it uses what uvicorn is made of (httptools on asyncio) and
nothing else: a piece costs some ten microseconds, a tenth of what a general client takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools

from server.config.errors import ConfigError

READ_BYTES = 65536
PORTS = {"http": 80, "https": 443}
EXAMPLE_URL = "http://127.0.0.1:8080"


@dataclass(frozen=True, slots=True)
class BaseUrl:
    """The address of a server; ``prefix`` is the path under which it serves its API."""

    scheme: str
    host: str
    port: int
    prefix: str

    def __str__(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{name}:{self.port}{self.prefix}"


class HttpError(Exception):
    """The server answered with an error status, or not in HTTP; the message quotes it."""


def parse_url(text: str) -> BaseUrl:
    """A base URL as users write it. Raises ``ConfigError``."""
    try:
        parts = urlsplit(text)
        if parts.scheme in PORTS and parts.hostname and not (parts.query or parts.fragment or parts.username):
            port = parts.port or PORTS[parts.scheme]
            return BaseUrl(parts.scheme, parts.hostname, port, parts.path.rstrip("/"))
    except ValueError:
        pass
    raise ConfigError(f"the URL {text!r} is not the base URL of a server; write it like {EXAMPLE_URL}")


class HttpAnswer:
    """An answer while it comes in."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.status = 0
        self._reader = reader
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._complete = False
        self._ends_by_closing = True

    def on_header(self, name: bytes, _value: bytes) -> None:
        """Called by the parser."""
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._ends_by_closing = False

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self.status = self._parser.get_status_code()

    def on_body(self, piece: bytes) -> None:
        """Called by the parser."""
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._complete = True

    async def read_head(self) -> None:
        """Wait for the status."""
        while not self.status:
            await self._read()

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives, one piece per read."""
        while True:
            if self._pieces:
                piece = b"".join(self._pieces)
                self._pieces.clear()
                yield piece
            elif self._complete:
                return
            else:
                await self._read()

    async def _read(self) -> None:
        data = await self._reader.read(READ_BYTES)
        if not data and self.status and self._ends_by_closing:
            self._complete = True
            return
        if not data:
            raise HttpError("the connection ended before the answer was complete")
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise HttpError(f"the server does not answer in HTTP: {error}") from None


@asynccontextmanager
async def post(base: BaseUrl, path: str, body: bytes, headers: dict[str, str]) -> AsyncIterator[HttpAnswer]:
    """Send a POST and yield its answer once the status is read; leaving the block early hangs up at once.

    Raises ``OSError`` where nothing answers and ``HttpError`` for any status but 200.
    """
    async with _exchange(base, "POST", path, body, headers) as answer:
        if answer.status != 200:
            raise HttpError(f"HTTP {answer.status}: {(await _rest(answer)).decode(errors='replace')[:300]}")
        yield answer


async def get(base: BaseUrl, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
    """The status and the whole body."""
    async with _exchange(base, "GET", path, b"", headers) as answer:
        return answer.status, await _rest(answer)


@asynccontextmanager
async def _exchange(
    base: BaseUrl, method: str, path: str, body: bytes, headers: dict[str, str]
) -> AsyncIterator[HttpAnswer]:
    reader, writer = await asyncio.open_connection(base.host, base.port, ssl=base.scheme == "https" or None)
    try:
        lines = [f"{method} {base.prefix}{path} HTTP/1.1", f"Host: {base.host}:{base.port}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}", "", ""]
        writer.write("\r\n".join(lines).encode() + body)
        answer = HttpAnswer(reader)
        await answer.read_head()
        yield answer
    finally:
        writer.transport.abort()


async def _rest(answer: HttpAnswer) -> bytes:
    return b"".join([piece async for piece in answer.pieces()])

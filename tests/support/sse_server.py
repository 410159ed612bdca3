"""A server that speaks just enough HTTP to be put under load: each POST gets the next script of pieces."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from server.bench.wire.client import BaseUrl

Pieces = Sequence[bytes | float]
"""What is written, with seconds of silence between."""


@dataclass(slots=True)
class SseServer:
    """``scripts`` are used up in order, the last one stays. ``most`` counts the requests that were open at once; no
    answer begins before it is ``together``."""

    scripts: deque[Pieces]
    status: str = "200 OK"
    together: int = 1
    gathered: asyncio.Event = field(default_factory=asyncio.Event)
    url: BaseUrl = field(init=False)
    bodies: list[bytes] = field(default_factory=list)
    left: int = 0
    open: int = 0
    most: int = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(int(line.split(":")[1]) for line in head.lower().splitlines() if "content-length" in line)
        self.bodies.append(await reader.readexactly(length))
        script = self.scripts.popleft() if len(self.scripts) > 1 else self.scripts[0]
        self.open += 1
        self.most = max(self.most, self.open)
        if self.most >= self.together:
            self.gathered.set()
        try:
            await self.gathered.wait()
            writer.write(f"HTTP/1.1 {self.status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            for piece in script:
                if isinstance(piece, float):
                    await asyncio.sleep(piece)
                else:
                    writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    await writer.drain()
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        except ConnectionError:
            self.left += 1
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def sse_server(*scripts: Pieces, status: str = "200 OK", together: int = 1) -> AsyncIterator[SseServer]:
    """The server on a free port of the loopback."""
    server = SseServer(deque(scripts), status, together)
    listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.url = BaseUrl("http", "127.0.0.1", listening.sockets[0].getsockname()[1], "")
    async with listening:
        yield server


def gemini_event(text: str, tokens: int, finish: str | None = None) -> bytes:
    """A chunk of a Gemini stream; ``tokens`` is the running total."""
    candidate: dict[str, object] = {"content": {"role": "model", "parts": [{"text": text}] if text else []}}
    if finish:
        candidate["finishReason"] = finish
    usage = {"promptTokenCount": 7, "candidatesTokenCount": tokens, "totalTokenCount": 7 + tokens}
    return b"data: " + json.dumps({"candidates": [candidate], "usageMetadata": usage}).encode() + b"\n\n"


def openai_event(text: str | None = None, finish: str | None = None, total: int | None = None) -> bytes:
    """A chunk of a chat completion; ``total`` makes it the one that tells the usage."""
    chunk: dict[str, object] = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}
    if total is not None:
        chunk = {"choices": [], "usage": {"completion_tokens": total, "prompt_tokens": 5}}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"

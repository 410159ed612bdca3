"""The bytes of one request on their way into an upload: gathered, and written off the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

from server.errors import ApiError
from server.storage.files.store import StoredFile
from server.storage.files.upload import NewFile, Uploads, Writer

GATHERED_BYTES = 1024**2
GATHERED_SECONDS = 30.0
"""Bytes that come slowly are handed over after this long, before their upload counts as abandoned."""


class Intake:
    """Takes the bytes in the order in which they come; at most ``GATHERED_BYTES`` and a piece are in memory."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._gathered = bytearray()
        self._settled_at = time.monotonic()

    async def add(self, data: bytes) -> None:
        """Raises as `Writer.write` does, sometimes only with bytes that come later."""
        self._gathered += data
        if len(self._gathered) >= GATHERED_BYTES or time.monotonic() - self._settled_at >= GATHERED_SECONDS:
            await self.settle()

    async def settle(self) -> None:
        """Hand over what was gathered."""
        data, self._gathered = bytes(self._gathered), bytearray()
        self._settled_at = time.monotonic()
        if data:
            await asyncio.to_thread(self._writer.write, data)


@asynccontextmanager
async def intake(uploads: Uploads, upload_id: str, offset: int) -> AsyncIterator[Intake]:
    """What has arrived is kept, even if the client hangs up midway."""
    writer = await asyncio.to_thread(uploads.writer, upload_id, offset)
    taking = Intake(writer)
    try:
        try:
            yield taking
        finally:
            await taking.settle()
    finally:
        # A write that is still running in a thread finishes before the writer closes.
        await asyncio.shield(asyncio.to_thread(writer.close))


async def take_whole(uploads: Uploads, new: NewFile, pieces: AsyncIterator[bytes]) -> StoredFile:
    """A file that comes in one request: kept whole, or not at all. Raises what the upload and ``pieces`` raise."""
    upload_id = await asyncio.to_thread(uploads.start, replace(new, whole=True))
    try:
        async with intake(uploads, upload_id, 0) as taking:
            async for piece in pieces:
                await taking.add(piece)
        return await asyncio.to_thread(uploads.finish, upload_id)
    except BaseException:
        with suppress(ApiError):
            await asyncio.shield(asyncio.to_thread(uploads.cancel, upload_id))
        raise

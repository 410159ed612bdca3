"""The text of PDF documents, read by a child process with little memory and time (`pdf_text.py`)."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from server.convert import pdf_text
from server.convert.media import Unreadable

MAX_BYTES = 50 * 1024**2
MAX_PAGES = 1000
"""Those of the real service."""
MAX_CHARACTERS = 10_000_000
DEADLINE_SECONDS = 30.0
AT_ONCE = 2
REMEMBERED_CHARACTERS = 20_000_000


class PdfReader:
    """Reads at most ``AT_ONCE`` documents at a time and remembers the last: chats send theirs with every turn."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(AT_ONCE)
        self._known: OrderedDict[bytes, str | Unreadable] = OrderedDict()

    async def text(self, source: BinaryIO | bytes, digest: bytes) -> str:
        """The text of a document, in a file with a descriptor or in memory; ``digest`` is the hash of its bytes.

        Raises ``Unreadable``.
        """
        if digest not in self._known:
            async with self._free:
                self._remember(digest, await _outcome(source))
        self._known.move_to_end(digest)
        found = self._known[digest]
        if isinstance(found, Unreadable):
            raise Unreadable(str(found))
        return found

    def _remember(self, digest: bytes, outcome: str | Unreadable) -> None:
        self._known[digest] = outcome
        while len(self._known) > 1 and sum(map(_size, self._known.values())) > REMEMBERED_CHARACTERS:
            self._known.popitem(last=False)


async def _outcome(source: BinaryIO | bytes) -> str | Unreadable:
    """A refusal is a result too, and remembered like one."""
    try:
        return await _read(source)
    except Unreadable as refusal:
        return refusal


def _size(outcome: str | Unreadable) -> int:
    return 1000 + len(str(outcome))


async def _read(source: BinaryIO | bytes) -> str:
    inline = source if isinstance(source, bytes) else None
    limits = (str(limit) for limit in (MAX_BYTES, MAX_PAGES, MAX_CHARACTERS))
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        str(Path(pdf_text.__file__)),
        *limits,
        stdin=asyncio.subprocess.PIPE if isinstance(source, bytes) else source,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={},
        cwd="/",
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            output, _ = await child.communicate(inline)
    except TimeoutError:
        raise Unreadable(f"reading it takes more than {DEADLINE_SECONDS:g} seconds") from None
    finally:
        if child.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()
    text = output.decode("utf-8", "replace")
    if child.returncode == pdf_text.UNREADABLE:
        raise Unreadable(text.rpartition("\0")[2])
    if child.returncode != 0:
        raise Unreadable(f"it cannot be read within {pdf_text.MEMORY_BYTES} bytes of memory; it may be damaged")
    return text

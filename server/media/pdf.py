"""The text of PDF documents, read by a child process with little memory and time (`pdf_text.py`)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from server.errors import ResourceExhausted
from server.media import pdf_text
from server.media.media_types import Unreadable
from server.offload.children import share_of_memory
from server.offload.fair import FairSlots

MAX_BYTES = 50 * 1024**2
MAX_PAGES = 1000
"""The limit of the real service."""
MAX_CHARACTERS = 10_000_000
DEADLINE_SECONDS = 30.0
MEMORY_BYTES = 1024**3
AT_ONCE = 2
PATIENCE_SECONDS = 60.0
"""How long a request waits in all for free readers, while documents of other requests are read."""
REMEMBERED_CHARACTERS = 20_000_000

_BUSY = "Documents of other requests are being read. Please try again later."


class ReadingClock:
    """The time of one request: ``reading`` runs only while its own documents are read, ``patience`` is how many seconds
    it will still wait for a free reader."""

    def __init__(self, reading: asyncio.Timeout) -> None:
        self.reading = reading
        self.patience = PATIENCE_SECONDS

    @asynccontextmanager
    async def paused(self, slot: AbstractAsyncContextManager[None]) -> AsyncGenerator[None, None]:
        """Holds ``slot``. The time until it is there is waiting, not reading."""
        now = asyncio.get_running_loop().time
        began, end = now(), self.reading.when()
        self.reading.reschedule(None)
        async with slot:
            waited = now() - began
            self.patience -= waited
            self.reading.reschedule(None if end is None else end + waited)
            yield


class PdfReader:
    """Reads at most ``AT_ONCE`` documents at a time and remembers the last: chats send theirs with every turn.

    Owners take turns. Only what depends on the document itself is remembered: its text, or why it has none. A time-out
    or a reader that died may be due to the machine, and a retry may succeed.
    """

    def __init__(self) -> None:
        self._readers = FairSlots(AT_ONCE, _BUSY)
        self._known: OrderedDict[bytes, str | Unreadable] = OrderedDict()

    async def text(self, source: BinaryIO | bytes, digest: bytes, owner: str, clock: ReadingClock) -> str:
        """The text of a document, in a file with a descriptor or in memory; ``digest`` is the hash of its bytes.

        Raises ``Unreadable``, and ``ResourceExhausted`` where no reader comes free in time.
        """
        if digest not in self._known:
            async with clock.paused(self._readers.of(owner, clock.patience)):
                if digest not in self._known:  # a request for the same one may have read it
                    self._known[digest] = await _read(source)
                    sizes = [1000 + len(str(outcome)) for outcome in self._known.values()]
                    while len(sizes) > 1 and sum(sizes) > REMEMBERED_CHARACTERS:
                        self._known.popitem(last=False)
                        del sizes[0]
        self._known.move_to_end(digest)
        found = self._known[digest]
        if isinstance(found, Unreadable):
            raise Unreadable(str(found))
        return found


async def _read(source: BinaryIO | bytes) -> str | Unreadable:
    """The document's text or why it has none. Raises ``Unreadable`` for what a retry may change."""
    inline = source if isinstance(source, bytes) else None
    memory = share_of_memory(MEMORY_BYTES)
    limits = (str(limit) for limit in (MAX_BYTES, MAX_PAGES, MAX_CHARACTERS, memory))
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        str(Path(pdf_text.__file__)),
        *limits,
        json.dumps([os.path.abspath(folder) for folder in sys.path]),  # -I forgets PYTHONPATH
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
        raise Unreadable(f"reading it takes more than {DEADLINE_SECONDS:g} seconds; send a part of it") from None
    finally:
        if child.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()
    text = output.decode("utf-8", "replace")
    if child.returncode == pdf_text.UNREADABLE:
        return Unreadable(text.rpartition("\0")[2])
    if child.returncode == -signal.SIGKILL:  # not sent from here: the system needed the memory
        raise ResourceExhausted("This machine has too little memory for the document now. Please try again later.")
    if child.returncode != 0:
        raise Unreadable(f"it cannot be read within {memory} bytes of memory; it may be damaged")
    return text

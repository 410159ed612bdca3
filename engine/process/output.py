"""What an engine process writes, as one JSON object a line, whoever speaks in it.

The process formats its own log so (`JsonLines`). What libraries print, in Python or in C, is not under its control: its
output is a pipe to the parent, which passes JSON on and logs everything else (`relayed`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import msgspec

_READ_BYTES = 65536
_LONGEST_LINE = 1 << 20  # what is longer is cut into several lines
_END_SECONDS = 1.0  # a program that the process had started may still hold the pipe

_log = logging.getLogger("castor.engine.output")


class JsonLines(logging.Formatter):
    """A record as one line of JSON, with the keys of the front end's log, and the process that wrote it."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "process": record.process,
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


@asynccontextmanager
async def relayed() -> AsyncIterator[int]:
    """The end of a pipe for a process to write to; what it writes becomes lines of this process's log.

    The block closes the end as soon as the process has it. Afterwards all that a process that has ended had written is
    logged, and the pipe is gone.
    """
    read_end, write_end = os.pipe()
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_end, "rb")
    )
    relaying = asyncio.create_task(_relay(reader))
    try:
        yield write_end
    finally:
        await asyncio.wait({relaying}, timeout=_END_SECONDS)
        relaying.cancel()
        transport.close()


async def _relay(output: asyncio.StreamReader) -> None:
    rest = b""
    while data := await output.read(_READ_BYTES):
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > _LONGEST_LINE:
            lines, rest = [*lines, rest], b""
        for line in lines:
            _pass_on(line)
    _pass_on(rest)


def _pass_on(line: bytes) -> None:
    """Write a line of the process's own log as it is, and log any other text."""
    try:
        msgspec.json.decode(line, type=dict)
    except msgspec.MsgspecError:
        text = line.decode(errors="replace").strip()
        if text:
            _log.warning("%s", text)
    else:
        print(line.decode(), file=sys.stderr, flush=True)

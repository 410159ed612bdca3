"""Requests that are read off the event loop because they are large."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from server.offload.fair import FairSlots

T = TypeVar("T")


class LargeRequests:
    """Work in a thread, one piece at a time: several threads would keep the event loop waiting for the interpreter's
    lock. Owners take turns."""

    def __init__(self) -> None:
        self._slots = FairSlots(1, "Too many long requests are being read. Please try again later.")

    async def run(self, owner: str, work: Callable[[], T]) -> T:
        """The result of ``work``. Raises what it raises, and ``ResourceExhausted`` while too many wait."""
        async with self._slots.of(owner):
            working = asyncio.ensure_future(asyncio.to_thread(work))
            try:
                return await asyncio.shield(working)
            finally:
                await asyncio.wait([working])  # a thread cannot be cancelled, so its slot stays taken until it ends

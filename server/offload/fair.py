"""A few slots for work that is long or large, shared fairly: those who wait take turns by owner."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from server.errors import ResourceExhausted

MAX_WAITING = 128
MAX_WAITING_OF_ONE = 32


class FairSlots:
    """``number`` slots. Owners that wait take turns: one job of the first owner, one of the next, and so on.

    So an owner with many jobs keeps others waiting for only one of them at a time. At most ``most_of_one`` jobs of
    an owner wait and ``most`` of all; the next is refused with the message ``busy``. Belongs to one event loop.
    """

    def __init__(
        self, number: int, busy: str, *, most: int = MAX_WAITING, most_of_one: int = MAX_WAITING_OF_ONE
    ) -> None:
        self._free = number
        self._busy = busy
        self._most, self._most_of_one = most, most_of_one
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # in the order of turns, never an empty queue

    @asynccontextmanager
    async def of(self, owner: str, patience: float | None = None) -> AsyncGenerator[None, None]:
        """Holds a slot. Raises ``ResourceExhausted`` at once where too many wait, or after ``patience`` seconds."""
        if self._free:
            self._free -= 1
        else:
            await self._wait(owner, patience)
        try:
            yield
        finally:
            self._hand_on()

    async def _wait(self, owner: str, patience: float | None) -> None:
        own = self._waiting.get(owner, ())
        if len(own) >= self._most_of_one or sum(map(len, self._waiting.values())) >= self._most:
            raise ResourceExhausted(self._busy)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        try:
            async with asyncio.timeout(patience):
                await turn
        except BaseException as end:
            own_left = self._waiting.get(owner)
            if turn.done() and not turn.cancelled():  # the slot came in the same moment
                self._hand_on()
            elif own_left is not None and turn in own_left:
                own_left.remove(turn)
                if not own_left:
                    del self._waiting[owner]
            if isinstance(end, TimeoutError):
                raise ResourceExhausted(self._busy) from None
            raise

    def _hand_on(self) -> None:
        """Pass a slot straight to the next in turn, so that no newcomer takes it first."""
        while self._waiting:
            owner, own = next(iter(self._waiting.items()))
            turn = own.popleft()
            stays = not turn.done()  # a caller that has just left takes no turn
            if stays or not own:
                del self._waiting[owner]
            if stays:
                if own:
                    self._waiting[owner] = own
                turn.set_result(None)
                return
        self._free += 1

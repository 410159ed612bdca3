"""Time: how long each part may take, and what ends the process when all of it is used up."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Mapping

EXIT_LATE = 3
"""The watchdog ended the process; what was found until then is written."""
# What the table at the end may take.
_RESERVE_SECONDS = 3.0
# What the end itself may take, where a kernel or a library holds the interpreter's lock.
_GRACE_SECONDS = 10.0


class Budget:
    """Shares the minutes among the parts by their weights; what one leaves over goes to those after it."""

    def __init__(self, started: float, minutes: float, weights: Mapping[str, float]) -> None:
        self._ends = started + minutes * 60 - _RESERVE_SECONDS
        self._weights = dict(weights)
        self._until = self._ends

    def begin(self, part: str) -> float:
        """The turn of a part; returns its seconds, none where nothing is left."""
        share = self._weights[part] / sum(self._weights.values())
        del self._weights[part]
        now = time.monotonic()
        seconds = max(0.0, self._ends - now) * share
        self._until = now + seconds
        return seconds

    @property
    def left(self) -> float:
        """Seconds that the present part still has; negative where it has taken more."""
        return self._until - time.monotonic()


class Watchdog:
    """Ends the process at its last instant, whatever hangs: ``last_words`` first, then without any clean-up."""

    def __init__(self, seconds: float, last_words: Callable[[], None]) -> None:
        self._last_words = last_words
        # Written in C, so it also comes where no Python runs any more.
        faulthandler.dump_traceback_later(seconds + _GRACE_SECONDS, exit=True)
        self._timer = threading.Timer(seconds, self._bite)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        """All is done in time."""
        self._timer.cancel()
        faulthandler.cancel_dump_traceback_later()

    def _bite(self) -> None:
        try:
            self._last_words()
        finally:
            os._exit(EXIT_LATE)

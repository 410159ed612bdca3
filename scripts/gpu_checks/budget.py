"""Time: how long each part may take, and the watchdog that ends the process when it is used up."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Mapping

EXIT_LATE = 3
"""The watchdog ended the process; the findings until then are written."""
# Reserved for the table at the end.
_RESERVE_SECONDS = 3.0
# Reserved for the shutdown, where a kernel or a library holds the interpreter's lock.
_GRACE_SECONDS = 10.0


class Budget:
    """Shares the minutes among the parts by their weights; what one does not use goes to those after it."""

    def __init__(self, started: float, minutes: float, weights: Mapping[str, float]) -> None:
        self._ends = started + minutes * 60 - _RESERVE_SECONDS
        self._weights = dict(weights)
        self._until = self._ends

    def begin(self, part: str) -> float:
        """Start a part; returns its seconds, 0 where none are left."""
        share = self._weights[part] / sum(self._weights.values())
        del self._weights[part]
        now = time.monotonic()
        seconds = max(0.0, self._ends - now) * share
        self._until = now + seconds
        return seconds

    @property
    def left(self) -> float:
        """Seconds that the current part has left; negative where it has overrun."""
        return self._until - time.monotonic()


class Watchdog:
    """Ends the process at the deadline, whatever hangs: calls ``last_words``, then exits without any clean-up."""

    def __init__(self, seconds: float, last_words: Callable[[], None]) -> None:
        self._last_words = last_words
        # Written in C, so it also works when no Python code runs any more.
        faulthandler.dump_traceback_later(seconds + _GRACE_SECONDS, exit=True)
        self._timer = threading.Timer(seconds, self._bite)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        """Everything finished in time."""
        self._timer.cancel()
        faulthandler.cancel_dump_traceback_later()

    def _bite(self) -> None:
        try:
            self._last_words()
        finally:
            os._exit(EXIT_LATE)

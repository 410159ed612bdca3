"""One candidate's way from tokens to text that may be shown."""

from __future__ import annotations

from engine.text.detokenizer import Detokenizer
from engine.text.stops import StopMatcher


class Streamer:
    """Detokenizes, then looks for stop strings."""

    def __init__(self, detokenizer: Detokenizer, stops: StopMatcher) -> None:
        self._detokenizer = detokenizer
        self._stops = stops

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete; no text follows."""
        return self._stops.stopped

    def feed(self, token_id: int) -> str:
        """The text that can be shown after this token."""
        return self._stops.feed(self._detokenizer.feed(token_id))

    def flush(self) -> str:
        """The text that was held back, at the candidate's end."""
        return self._stops.feed(self._detokenizer.flush()) + self._stops.flush()

"""One candidate's way from tokens to text that may be shown."""

from __future__ import annotations

from engine.text.detokenizer import Detokenizer
from engine.text.stops import StopMatcher


class Streamer:
    """Detokenizes, then looks for stop strings, which do not count in thoughts."""

    def __init__(self, detokenizer: Detokenizer, stops: StopMatcher) -> None:
        self._detokenizer = detokenizer
        self._stops = stops

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete; no text follows."""
        return self._stops.stopped

    def feed(self, token_id: int, *, thought: bool = False) -> str:
        """The text that can be shown after this token."""
        text = self._detokenizer.feed(token_id)
        return text if thought and not self.stopped else self._stops.feed(text)

    def flush(self, *, thought: bool = False) -> str:
        """The text that was held back, at the candidate's end or where thoughts begin or end."""
        text = self._detokenizer.flush()
        return text if thought and not self.stopped else self._stops.feed(text) + self._stops.flush()

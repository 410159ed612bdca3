"""Stop strings: ends the text before the first one that is complete and never shows the head of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Looks for stop strings in text that comes in pieces.

    The stop that is complete first wins; of several complete at the same character, the longest. Only a suffix that is
    really the beginning of a stop is held back. Each stop is matched by the Knuth-Morris-Pratt method, so the time per
    character does not depend on the stops' lengths.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._patterns = [_Pattern(stop) for stop in stops]
        self._held = ""

    def feed(self, text: str) -> str:
        """The text that can be shown now; nothing any more once ``stopped``."""
        if self.stopped:
            return ""
        if not self._patterns:
            return text
        text, searched = self._held + text, len(self._held)
        for end in range(searched, len(text)):
            complete = max(pattern.step(text[end]) for pattern in self._patterns)
            if complete:
                self.stopped = True
                self._held = ""
                return text[: end + 1 - complete]
        shown = len(text) - max(pattern.matched for pattern in self._patterns)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held back, as the text ended without completing a stop."""
        held, self._held = self._held, ""
        return held


class _Pattern:
    """How much of one stop string the text's end matches."""

    def __init__(self, stop: str) -> None:
        self.matched = 0
        self._stop = stop
        self._borders = _borders(stop)

    def step(self, character: str) -> int:
        """Take one character; returns the stop's length if it is complete, else 0."""
        while self.matched and self._stop[self.matched] != character:
            self.matched = self._borders[self.matched - 1]
        if self._stop[self.matched] == character:
            self.matched += 1
        return self.matched if self.matched == len(self._stop) else 0


def _borders(stop: str) -> list[int]:
    """For each prefix of the string, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(stop)
    matched = 0
    for index in range(1, len(stop)):
        while matched and stop[matched] != stop[index]:
            matched = borders[matched - 1]
        if stop[matched] == stop[index]:
            matched += 1
        borders[index] = matched
    return borders

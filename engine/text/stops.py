"""Stop strings: ends the text before the first complete one and never shows the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Looks for stop strings in text that comes in pieces.

    The stop that is complete first wins; of several complete at the same character, the longest. Stops do not count
    inside the spans of ``exempt``, from a beginning (the longest of those complete at once) to its end, both included;
    a stop that starts to the left of the beginning counts if it is complete first.

    Text is held back only if it may become a stop, or from a stop that may turn out to lie inside the beginning of a
    span. Each string is matched by the Knuth-Morris-Pratt method, so the time per character does not depend on the
    strings' lengths.
    """

    def __init__(self, stops: Sequence[str], exempt: Sequence[tuple[str, str]] = ()) -> None:
        self.stopped = False
        self._stops = [_Pattern(stop) for stop in stops]
        # Without stops there is nothing to be exempt from.
        self._spans = [(_Pattern(begin), _Pattern(end)) for begin, end in exempt if stops]
        self._end: _Pattern | None = None
        self._held = ""
        self._pending: int | None = None  # how many characters ago a stop began that may lie inside a beginning

    def feed(self, text: str) -> str:
        """The text that can be shown now; always empty once ``stopped``."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text, searched = self._held + text, len(self._held)
        for end in range(searched, len(text)):
            length = self._step(text[end])
            if length:
                self.stopped = True
                self._held = ""
                return text[: end + 1 - length]
        self._held = text[len(text) - self._unsure :] if self._unsure else ""
        return text[: len(text) - len(self._held)]

    def flush(self) -> str:
        """What was held back, at the end of a text; another text may follow."""
        held, self._held = self._held, ""
        if self._pending is not None:
            self.stopped = True
            held = held[: len(held) - self._pending]
        self._forget()
        self._end = None
        return held

    @property
    def _unsure(self) -> int:
        if self._end is not None:
            return 0
        return max(self._pending or 0, *(pattern.matched for pattern in self._stops))

    def _step(self, character: str) -> int:
        """Take one character; returns how many characters ago a stop that counts began, else 0."""
        if self._end is not None:
            if self._end.step(character):
                self._end = None
            return 0
        complete = max(stop.step(character) for stop in self._stops)
        if not self._spans:
            return complete
        if self._pending is not None:
            self._pending += 1
        entered = max(((begin.step(character), end) for begin, end in self._spans), key=lambda span: span[0])
        heads = entered[0] or max(begin.matched for begin, _ in self._spans)
        # A stop that starts left of every possible beginning cannot be inside one. The older stop was complete first.
        for began in (self._pending, complete):
            if began and began > heads:
                return began
        if entered[0]:
            self._forget()
            self._end = entered[1]
        elif complete and self._pending is None:
            self._pending = complete
        return 0

    def _forget(self) -> None:
        self._pending = None
        for pattern in [*self._stops, *(part for span in self._spans for part in span)]:
            pattern.matched = 0


class _Pattern:
    """How much of one string the text's end matches."""

    def __init__(self, text: str) -> None:
        self.matched = 0
        self._text = text
        self._borders = _borders(text)

    def step(self, character: str) -> int:
        """Take one character; returns the string's length if it is complete, else 0."""
        if self.matched == len(self._text):
            self.matched = self._borders[-1]
        while self.matched and self._text[self.matched] != character:
            self.matched = self._borders[self.matched - 1]
        if self._text[self.matched] == character:
            self.matched += 1
        return self.matched if self.matched == len(self._text) else 0


def _borders(text: str) -> list[int]:
    """For each prefix of the string, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    matched = 0
    for index in range(1, len(text)):
        while matched and text[matched] != text[index]:
            matched = borders[matched - 1]
        if text[matched] == text[index]:
            matched += 1
        borders[index] = matched
    return borders

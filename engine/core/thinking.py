"""Tracks where the thoughts of one candidate begin and end, and forces their end when their budget is spent."""

from __future__ import annotations

from engine.api.sampling import Thinking


class Thoughts:
    """Whether a candidate is inside its thoughts, after each token that was fed.

    ``inside`` is true from the start marker, or from the beginning if the prompt ends with one, to the end marker.
    ``count`` is the number of thought tokens, markers included; the budget counts those between the markers. Outside,
    the last ``held`` tokens may be the beginning of a start marker: whether they are is not known yet.

    Thoughts may begin anywhere in an answer, unless it is ``constrained``: then only before its first token.
    """

    def __init__(self, thinking: Thinking, *, constrained: bool) -> None:
        self.inside = thinking.open
        self.count = 0
        self._thinking = thinking
        self._constrained = constrained
        self._may_open = bool(thinking.start)
        self._spent = 0
        self._matched = 0

    @property
    def held(self) -> int:
        return 0 if self.inside else self._matched

    @property
    def forced(self) -> int | None:
        """The only token that may follow, if the budget is spent; else None."""
        budget = self._thinking.budget
        if not self.inside or budget is None or self._spent < budget:
            return None
        return self._thinking.end[self._matched]

    @property
    def may_force(self) -> bool:
        """Whether one more token may make the next one ``forced``."""
        budget = self._thinking.budget
        return budget is not None and self._spent + 1 >= budget and (self.inside or self._may_open)

    @property
    def opening(self) -> int | None:
        """The next token of the start marker, if thoughts may begin now; else None."""
        return self._thinking.start[self._matched] if self._may_open and not self.inside else None

    def feed(self, token_id: int) -> None:
        """Take the candidate's next token."""
        start, end, before = self._thinking.start, self._thinking.end, self._matched
        if self.inside:
            self.count += 1
            self._spent += 1
            self._matched = _overlap((*end[:before], token_id), end)
            if self._matched == len(end):
                self.inside, self._matched = False, 0
                self._spent -= len(end)
                self._may_open = bool(start) and not self._constrained
        elif self._may_open:
            self._matched = _overlap((*start[:before], token_id), start)
            if self._matched == len(start):
                self.inside, self._matched = True, 0
                self.count += len(start)
            elif self._constrained and self._matched <= before:
                self._may_open, self._matched = False, 0


def _overlap(tokens: tuple[int, ...], marker: tuple[int, ...]) -> int:
    """The largest number of last tokens that are the beginning of the marker."""
    return next(n for n in range(len(tokens), -1, -1) if tokens[len(tokens) - n :] == marker[:n])

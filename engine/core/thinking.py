"""Follows one candidate's tokens into its thoughts and out of them again, and ends them where their budget is spent."""

from __future__ import annotations

from engine.api.requests import Thinking


class Thoughts:
    """Where in its thoughts a candidate is, after each token that it was fed.

    ``inside`` is true from the start marker, or from the beginning if the prompt wrote it, to the end marker. ``count``
    are the tokens of thoughts, markers included; the budget counts those between the markers. Outside, the last
    ``held`` tokens may be the head of a start marker: what they are is not known yet.

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
        """The only token that may follow, where the budget is spent."""
        budget = self._thinking.budget
        if not self.inside or budget is None or self._spent < budget:
            return None
        return self._thinking.end[self._matched]

    @property
    def opening(self) -> int | None:
        """The token that begins the start marker, or goes on with it, where thoughts may begin now."""
        return self._thinking.start[self._matched] if self._may_open and not self.inside else None

    def feed(self, token_id: int) -> None:
        """Take the candidate's next token."""
        if self.inside:
            self._feed_inside(token_id)
        elif self._may_open:
            self._feed_outside(token_id)

    def _feed_inside(self, token_id: int) -> None:
        end = self._thinking.end
        self.count += 1
        self._spent += 1
        self._matched = _overlap((*end[: self._matched], token_id), end)
        if self._matched == len(end):
            self.inside, self._matched = False, 0
            self._spent -= len(end)
            self._may_open = bool(self._thinking.start) and not self._constrained

    def _feed_outside(self, token_id: int) -> None:
        start = self._thinking.start
        before = self._matched
        self._matched = _overlap((*start[:before], token_id), start)
        if self._matched == len(start):
            self.inside, self._matched = True, 0
            self.count += len(start)
        elif self._constrained and self._matched <= before:
            self._may_open, self._matched = False, 0


def _overlap(tokens: tuple[int, ...], marker: tuple[int, ...]) -> int:
    """How many of the last tokens are the head of the marker, at most."""
    return next(n for n in range(len(tokens), -1, -1) if tokens[len(tokens) - n :] == marker[:n])

"""How often each token stands in an answer, counted while the answer grows."""

from __future__ import annotations

from array import array

from engine.scheduling.sequence import Sequence


class TokenCounts:
    """The distinct tokens of one sequence, and how often each stands in its answer.

    ``ids`` and ``counts`` belong together, place by place, in the order in which tokens first came. With
    ``with_prompt`` the tokens of the prompt are there too, with a count of 0 until the answer holds them. Both are
    arrays of 64-bit integers.
    """

    def __init__(self, with_prompt: bool) -> None:
        self._with_prompt = with_prompt
        self._end = 0
        self._start_over(())

    def update(self, sequence: Sequence) -> None:
        """Count the tokens that ``sequence`` gained since the last call; no others are looked at."""
        prompt = sequence.request.prompt
        if not len(prompt) <= self._end <= len(sequence.tokens):
            # The first call, or tokens were taken back.
            self._start_over(prompt)
        for token in sequence.tokens[self._end :]:
            place = self._place_of.setdefault(token, len(self.ids))
            if place == len(self.ids):
                self.ids.append(token)
                self.counts.append(0)
            self.counts[place] += 1
        self._end = len(sequence.tokens)

    def _start_over(self, prompt: tuple[int, ...]) -> None:
        self.ids = array("q", dict.fromkeys(prompt) if self._with_prompt else ())
        self.counts = array("q", bytes(8 * len(self.ids)))
        self._place_of = {token: place for place, token in enumerate(self.ids)}
        self._end = len(prompt)

"""How often each token occurs in an answer, counted while the answer grows."""

from __future__ import annotations

from array import array

from engine.scheduling.sequence import Sequence


class TokenCounts:
    """The distinct tokens of one sequence, and how often each occurs in its answer.

    ``ids`` and ``counts`` are parallel arrays of 64-bit integers, in the order in which tokens first occurred.
    ``with_prompt`` includes the tokens of the prompt, with a count of 0 until they occur in the answer.
    """

    def __init__(self, with_prompt: bool) -> None:
        self._with_prompt = with_prompt
        self._end = 0
        self._start_over(())

    def update(self, sequence: Sequence) -> None:
        """Count the tokens added to ``sequence`` since the last call; no others are looked at."""
        prompt = sequence.request.prompt
        if not len(prompt) <= self._end <= len(sequence.tokens):
            # The first call, or tokens were removed.
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

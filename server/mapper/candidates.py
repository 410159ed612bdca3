"""One candidate as it grows: what was gained since it was last told, and what is said when it ends."""

from __future__ import annotations

from typing import Any

from engine.types import CandidateFinished, Delta, FinishReason
from server.mapper.logprobs import Step, TokenText, logprobs_result

_REASONS = {FinishReason.STOP: "STOP", FinishReason.MAX_TOKENS: "MAX_TOKENS"}


class Candidate:
    """Gathers a candidate's deltas. ``tokens`` counts all of its tokens so far."""

    def __init__(self, index: int, token_text: TokenText) -> None:
        self.tokens = 0
        self.finished: CandidateFinished | None = None
        self.told = False
        self._index = index
        self._token_text = token_text
        self._text: list[str] = []
        self._steps: list[Step] = []
        self._logprob_sum = 0.0
        self._scored = False

    def grow(self, delta: Delta) -> None:
        """Take what the engine added. Log-probabilities wait here until there is text to go with them."""
        self.tokens += len(delta.token_ids)
        if delta.text:
            self._text.append(delta.text)
        if delta.logprobs:
            self._scored = True
            self._steps += map(Step, delta.token_ids, delta.logprobs)
            self._logprob_sum += sum(step.chosen for step in delta.logprobs)

    @property
    def has_text(self) -> bool:
        """Whether there is text that was not told yet."""
        return bool(self._text)

    def piece(self) -> dict[str, Any]:
        """The candidate of one chunk: what was gained since the last one. Its content always has a part and a role."""
        piece: dict[str, Any] = {
            "content": {"parts": [{"text": "".join(self._text)}], "role": "model"},
            "index": self._index,
        }
        if self._steps:
            piece["logprobsResult"] = logprobs_result(self._steps, self._token_text)
        self._text, self._steps = [], []
        return piece

    def ending(self) -> dict[str, Any]:
        """The last piece, with the finish reason and the totals."""
        assert self.finished is not None
        self.told = True
        piece = self.piece()
        piece["finishReason"] = _REASONS[self.finished.reason]
        piece["tokenCount"] = self.finished.tokens
        if self._scored:
            piece["avgLogprobs"] = self._logprob_sum / self.tokens
        return piece

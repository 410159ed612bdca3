"""The sampler of a batch: runs the stages in their order and puts the rows together."""

from __future__ import annotations

from collections.abc import Sequence as Batch
from typing import Any

import numpy as np

from engine.constraints.masks import Mask
from engine.sampling.constraints import constrained
from engine.sampling.draw import draw
from engine.sampling.logprobs import token_logprobs
from engine.sampling.noise import uniform
from engine.sampling.penalties import Penalties
from engine.scheduling.contracts import Sampled
from engine.scheduling.sequence import Sequence

_Launched = tuple[Any, list[Sequence], list[Mask | None]]


class BatchSampler:
    """``engine.scheduling.contracts.Sampler``; between calls it keeps what ``Penalties`` counted.

    Logits are arrays of float32, or what NumPy reads as such: tensors of torch in the machine's memory.
    """

    def __init__(self) -> None:
        self._penalties = Penalties()

    def launch(
        self, logits: Any, sequences: list[Sequence], masks: list[Mask | None], _pending: list[int | None]
    ) -> _Launched:
        """Keeps what it is given: there is no step to launch before these tokens are read."""
        return logits, sequences, masks

    def finish(self, launched: _Launched) -> list[Sampled]:
        return self.sample(*launched)

    def sample(self, logits: Any, sequences: Batch[Sequence], masks: Batch[Mask | None]) -> list[Sampled]:
        """The next token for each row of ``logits`` [rows, vocabulary], out of those that its mask allows.

        Raises ``FloatingPointError`` if any row's largest logit is not finite (NaN anywhere, an infinity on top, or
        nothing possible that its mask allows); the other rows succeed in a call of their own.
        """
        assert len(logits) == len(sequences) == len(masks), "one sequence owns each row"
        if not sequences:
            return []
        raw = np.asarray(logits, np.float32)
        # Infinities and NaN are looked for here; the smallest temperatures make infinities of what cannot be drawn.
        with np.errstate(all="ignore"):
            scores = self._penalties.apply(constrained(raw, masks), sequences)
            if not np.isfinite(scores.max(axis=1)).all():
                raise FloatingPointError("the model's logits are not finite")
            tokens = [_chosen(*row) for row in zip(scores, sequences, strict=True)]
            reports = token_logprobs(raw, sequences, tokens)
        return [Sampled(*pair) for pair in zip(tokens, reports, strict=True)]


def _chosen(scores: np.ndarray, sequence: Sequence) -> int:
    sampling = sequence.request.sampling
    if not sampling.temperature > 0:
        return int(scores.argmax())  # the first of equals, which is the lowest id
    return draw(scores, sampling, uniform(sampling.seed, sequence.candidate, len(sequence.tokens)))

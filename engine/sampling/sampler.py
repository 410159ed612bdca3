"""The sampler of a batch: runs the stages in their order and puts the rows together."""

from __future__ import annotations

from collections.abc import Sequence as Batch

import torch

from engine.constraints.masks import Mask
from engine.sampling.constraints import constrained
from engine.sampling.draw import draw
from engine.sampling.filters import make_filters
from engine.sampling.logprobs import token_logprobs
from engine.sampling.noise import uniform
from engine.sampling.penalties import Penalties
from engine.scheduling.contracts import Sampled
from engine.scheduling.sequence import Sequence


class BatchSampler:
    """``engine.scheduling.contracts.Sampler``; between calls it keeps what ``Penalties`` counted."""

    def __init__(self) -> None:
        self._penalties = Penalties()

    def launch(
        self,
        logits: torch.Tensor,
        sequences: list[Sequence],
        masks: list[Mask | None],
        _pending: list[int | None],
    ) -> tuple[torch.Tensor, list[Sequence], list[Mask | None]]:
        """Keeps what it is given: there is no step to launch before these tokens are read."""
        return logits, sequences, masks

    def finish(self, launched: tuple[torch.Tensor, list[Sequence], list[Mask | None]]) -> list[Sampled]:
        return self.sample(*launched)

    def sample(self, logits: torch.Tensor, sequences: Batch[Sequence], masks: Batch[Mask | None]) -> list[Sampled]:
        """The next token for each row of ``logits`` [rows, vocabulary], out of those that its mask allows.

        Raises ``FloatingPointError`` if any row's largest logit is not finite (NaN anywhere, an infinity on top, or
        nothing possible that its mask allows); the other rows succeed in a call of their own.
        """
        assert len(logits) == len(sequences) == len(masks), "one sequence owns each row"
        if not sequences:
            return []
        with torch.inference_mode():
            raw = logits.float()
            scores = self._penalties.apply(constrained(raw, masks), sequences)
            if not scores.amax(dim=-1).isfinite().all():
                raise FloatingPointError("the model's logits are not finite")
            drawn = [row for row, sequence in enumerate(sequences) if sequence.request.sampling.temperature > 0]
            tokens = [0] * len(sequences)
            if len(drawn) < len(sequences):
                # argmax takes the first of equals, which is the lowest id.
                tokens = scores.argmax(dim=-1).tolist()
            if drawn:
                owners = [sequences[row] for row in drawn]
                filters = make_filters(owners, scores.shape[1], scores.device)
                uniforms = [uniform(s.request.sampling.seed, s.candidate, len(s.tokens)) for s in owners]
                found = draw(scores if len(drawn) == len(sequences) else scores[drawn], filters, uniforms)
                for row, token in zip(drawn, found, strict=True):
                    tokens[row] = token
            reports = token_logprobs(raw, sequences, tokens)
        return [Sampled(*pair) for pair in zip(tokens, reports, strict=True)]

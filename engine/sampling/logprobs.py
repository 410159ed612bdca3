"""Raw log-probabilities: of the model itself, before penalties, temperature and filters."""

from __future__ import annotations

from collections.abc import Sequence as Batch

import torch

from engine.api.events import TokenLogprobs, TopLogprob
from engine.sampling.ranking import ranked
from engine.scheduling.sequence import Sequence

# JSON has no infinity: a token of probability zero is reported with this logarithm, lower than any float32 can reach.
LOWEST_LOGPROB = -9999.0


def token_logprobs(logits: torch.Tensor, sequences: Batch[Sequence], tokens: Batch[int]) -> list[TokenLogprobs | None]:
    """For each row that asks, the natural log-probabilities of its token and of its top candidates, descending.

    Equal candidates are in the order of their ids. Never infinite: ``LOWEST_LOGPROB`` is the minimum.
    """
    asked = [sequence.request.sampling.logprobs for sequence in sequences]
    rows = [row for row, top in enumerate(asked) if top is not None]
    reports: list[TokenLogprobs | None] = [None] * len(asked)
    if not rows:
        return reports
    raw = logits[rows].log_softmax(dim=-1).clamp_(min=LOWEST_LOGPROB)
    chosen = raw.gather(1, torch.tensor([[tokens[row]] for row in rows], device=raw.device)).squeeze(1).tolist()
    best, ids = (part.tolist() for part in ranked(raw, max(asked[row] or 0 for row in rows)))
    for i, row in enumerate(rows):
        top = map(TopLogprob, ids[i][: asked[row]], best[i])
        reports[row] = TokenLogprobs(chosen[i], tuple(top))
    return reports

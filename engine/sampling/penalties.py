"""Presence and frequency penalties over the tokens of the response so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Batch

import torch

from engine.scheduling.sequence import Sequence


def penalised(logits: torch.Tensor, sequences: Batch[Sequence]) -> torch.Tensor:
    """``logit - presence - frequency * count`` for each token that the row's response already holds.

    The formula of OpenAI's API reference, which Gemini's ``presencePenalty`` and ``frequencyPenalty`` share. The prompt
    does not count. Returns ``logits`` itself where no row has anything to penalise.
    """
    rows: list[int] = []
    tokens: list[int] = []
    amounts: list[float] = []
    for row, sequence in enumerate(sequences):
        sampling = sequence.request.sampling
        if sampling.presence_penalty or sampling.frequency_penalty:
            for token, count in Counter(sequence.sampled).items():
                rows.append(row)
                tokens.append(token)
                amounts.append(sampling.presence_penalty + sampling.frequency_penalty * count)
    if not rows:
        return logits
    where = (torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device))
    return logits.index_put(where, -torch.tensor(amounts, device=logits.device), accumulate=True)

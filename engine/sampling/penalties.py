"""Penalties for tokens that have occurred before: repetition, presence, frequency."""

from __future__ import annotations

from collections.abc import Sequence as Batch
from weakref import WeakKeyDictionary

import torch

from engine.sampling.token_counts import TokenCounts
from engine.scheduling.sequence import Sequence


class Penalties:
    """Keeps the counts of a sequence for as long as the sequence lives, so that a step counts only its new tokens."""

    def __init__(self) -> None:
        self._counts: WeakKeyDictionary[Sequence, TokenCounts] = WeakKeyDictionary()

    def apply(self, logits: torch.Tensor, sequences: Batch[Sequence]) -> torch.Tensor:
        """``logits`` [rows, vocabulary] with the penalties of each row's sequence; unchanged if no row has any.

        First the repetition penalty, for the tokens of prompt and answer, as in transformers: a logit below zero is
        multiplied by it, any other divided. Then ``logit - presence - frequency * count`` for the tokens of the answer,
        the formula of OpenAI's API reference, which Gemini's ``presencePenalty`` and ``frequencyPenalty`` share.
        """
        rows: list[int] = []
        counts: list[TokenCounts] = []
        for row, sequence in enumerate(sequences):
            sampling = sequence.request.sampling
            repetition = sampling.repetition_penalty != 1
            if not (repetition or sampling.presence_penalty or sampling.frequency_penalty):
                continue
            if sequence not in self._counts:
                self._counts[sequence] = TokenCounts(with_prompt=repetition)
            counted = self._counts[sequence]
            counted.update(sequence)
            if counted.ids:
                rows.append(row)
                counts.append(counted)
        if not rows:
            return logits
        device = logits.device
        lengths = torch.tensor([len(counted.ids) for counted in counts])
        params = [sequences[row].request.sampling for row in rows]

        def each_token(numbers: list[float]) -> torch.Tensor:
            return torch.tensor(numbers, dtype=torch.float64).repeat_interleave(lengths)

        where = (
            torch.tensor(rows).repeat_interleave(lengths).to(device),
            torch.frombuffer(bytearray().join(counted.ids for counted in counts), dtype=torch.int64).to(device),
        )
        scores = logits[where]
        if any(p.repetition_penalty != 1 for p in params):
            factors = each_token([p.repetition_penalty for p in params]).float().to(device)
            scores = torch.where(scores < 0, scores * factors, scores / factors)
        times = torch.frombuffer(bytearray().join(counted.counts for counted in counts), dtype=torch.int64)
        amounts = each_token([p.presence_penalty for p in params])
        amounts = (amounts + each_token([p.frequency_penalty for p in params]) * times).masked_fill(times == 0, 0)
        return logits.index_put(where, scores - amounts.float().to(device))

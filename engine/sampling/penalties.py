"""Penalties for tokens that have occurred before: repetition, presence, frequency."""

from __future__ import annotations

from collections.abc import Sequence as Batch
from weakref import WeakKeyDictionary

import numpy as np

from engine.api.sampling import SamplingParams
from engine.sampling.token_counts import TokenCounts
from engine.scheduling.sequence import Sequence


def has_penalties(sampling: SamplingParams) -> bool:
    """Whether any penalty is on."""
    return bool(sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty)


class Penalties:
    """Keeps the counts of a sequence for as long as the sequence lives, so that a step counts only its new tokens."""

    def __init__(self) -> None:
        self._counts: WeakKeyDictionary[Sequence, TokenCounts] = WeakKeyDictionary()

    def apply(self, logits: np.ndarray, sequences: Batch[Sequence]) -> np.ndarray:
        """``logits`` [rows, vocabulary] with the penalties of each row's sequence; unchanged if no row has any.

        First the repetition penalty, for the tokens of prompt and answer, as in transformers: a logit below zero is
        multiplied by it, any other divided. Then ``logit - presence - frequency * count`` for the tokens of the answer,
        the formula of OpenAI's API reference, which Gemini's ``presencePenalty`` and ``frequencyPenalty`` share.
        """
        result = logits
        for row, sequence in enumerate(sequences):
            sampling = sequence.request.sampling
            if not has_penalties(sampling):
                continue
            if sequence not in self._counts:
                self._counts[sequence] = TokenCounts(with_prompt=sampling.repetition_penalty != 1)
            counted = self._counts[sequence]
            counted.update(sequence)
            if not counted.ids:
                continue
            if result is logits:
                result = logits.copy()
            ids, times = np.array(counted.ids), np.array(counted.counts)
            scores, factor = result[row, ids], np.float32(sampling.repetition_penalty)
            scores = np.where(scores < 0, scores * factor, scores / factor)
            amounts = np.where(times, sampling.presence_penalty + sampling.frequency_penalty * times, 0)
            result[row, ids] = scores - amounts.astype(np.float32)
        return result

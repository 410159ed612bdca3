"""Raw log-probabilities: of the model itself, before penalties, temperature and filters."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Batch

import numpy as np

from engine.api.events import TokenLogprobs, TopLogprob
from engine.sampling.draw import most_likely
from engine.scheduling.sequence import Sequence

# JSON has no infinity: a token of probability zero is reported with this logarithm, lower than any float32 can reach.
LOWEST_LOGPROB = -9999.0


def token_logprobs(logits: np.ndarray, sequences: Batch[Sequence], tokens: Batch[int]) -> list[TokenLogprobs | None]:
    """For each row that asks, the natural log-probabilities of its token and of its top candidates, descending.

    Equal candidates are in the order of their ids. Never infinite: ``LOWEST_LOGPROB`` is the minimum.
    """
    reports: list[TokenLogprobs | None] = [None] * len(sequences)
    rows, _ = rows_that_ask(sequences)
    for row in rows:
        raw, most = logits[row], sequences[row].request.sampling.logprobs or 0
        # The terms of log_softmax, but only for the tokens that are reported.
        largest = raw.max()
        mass = np.log(np.exp(raw - largest).sum())
        ids = np.append(most_likely(raw, most) if most else np.empty(0, np.int64), tokens[row])
        values = np.maximum(raw[ids] - largest - mass, np.float32(LOWEST_LOGPROB))
        best = np.argsort(-values[:-1], kind="stable")[:most]
        reports[row] = report(values[-1], ids[best], values[best])
    return reports


def rows_that_ask(sequences: Batch[Sequence]) -> tuple[list[int], int]:
    """The rows that ask for log-probabilities, and how many top candidates one of them asks for at most."""
    asked = {row: top for row, s in enumerate(sequences) if (top := s.request.sampling.logprobs) is not None}
    return list(asked), max(asked.values(), default=0)


def report(chosen: float, ids: Iterable[float], logprobs: Iterable[float]) -> TokenLogprobs:
    """The log-probability of the token, and the ids and log-probabilities of the top candidates, as they are sent."""
    return TokenLogprobs(float(chosen), tuple(map(TopLogprob, map(int, ids), map(float, logprobs))))

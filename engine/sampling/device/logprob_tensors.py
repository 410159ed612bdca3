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
    reports: list[TokenLogprobs | None] = [None] * len(sequences)
    rows, most = rows_that_ask(sequences)
    if rows:
        chosen = torch.tensor([[tokens[row]] for row in rows], device=logits.device)
        for row, numbers in zip(rows, logprob_numbers(logits[rows], chosen, most).tolist(), strict=True):
            reports[row] = report(numbers, sequences[row])
    return reports


def rows_that_ask(sequences: Batch[Sequence]) -> tuple[list[int], int]:
    """The rows that ask for log-probabilities, and how many top candidates one of them asks for at most."""
    asked = {row: top for row, s in enumerate(sequences) if (top := s.request.sampling.logprobs) is not None}
    return list(asked), max(asked.values(), default=0)


def logprob_numbers(logits: torch.Tensor, tokens: torch.Tensor, most: int) -> torch.Tensor:
    """What ``report`` reads, float64 [rows, 1 + 2 * most], of ``tokens`` [rows, 1]. Reads no number on the host."""
    raw = logits.log_softmax(dim=-1).clamp_(min=LOWEST_LOGPROB)
    best, ids = ranked(raw, most)
    return torch.cat((raw.gather(1, tokens).double(), best.double(), ids.double()), dim=1)


def report(numbers: list[float], sequence: Sequence) -> TokenLogprobs:
    """One row of ``logprob_numbers`` with as many candidates as its sequence asks for."""
    chosen, *rest = numbers
    most, asked = len(rest) // 2, sequence.request.sampling.logprobs
    return TokenLogprobs(chosen, tuple(map(TopLogprob, map(int, rest[most:][:asked]), rest[:most])))

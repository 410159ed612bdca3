"""Raw log-probabilities on the device, with the numbers of ``engine.sampling.logprobs``."""

from __future__ import annotations

from collections.abc import Sequence as Batch

import torch

from engine.api.events import TokenLogprobs
from engine.sampling.device.ranking import ranked
from engine.sampling.logprobs import LOWEST_LOGPROB, report, rows_that_ask
from engine.scheduling.sequence import Sequence


def reported(logits: torch.Tensor, sequences: Batch[Sequence], tokens: Batch[int]) -> list[TokenLogprobs | None]:
    """``engine.sampling.logprobs.token_logprobs`` of logits on a device."""
    reports: list[TokenLogprobs | None] = [None] * len(sequences)
    rows, most = rows_that_ask(sequences)
    if rows:
        chosen = torch.tensor([[tokens[row]] for row in rows], device=logits.device)
        for row, numbers in zip(rows, logprob_numbers(logits[rows], chosen, most).tolist(), strict=True):
            reports[row] = read_report(numbers, sequences[row])
    return reports


def logprob_numbers(logits: torch.Tensor, tokens: torch.Tensor, most: int) -> torch.Tensor:
    """What ``read_report`` reads, float64 [rows, 1 + 2 * most], of ``tokens`` [rows, 1]. Reads no number on the
    host."""
    raw = logits.log_softmax(dim=-1).clamp_(min=LOWEST_LOGPROB)
    best, ids = ranked(raw, most)
    return torch.cat((raw.gather(1, tokens).double(), best.double(), ids.double()), dim=1)


def read_report(numbers: list[float], sequence: Sequence) -> TokenLogprobs:
    """One row of ``logprob_numbers`` with as many candidates as its sequence asks for."""
    chosen, *rest = numbers
    most, asked = len(rest) // 2, sequence.request.sampling.logprobs
    return report(chosen, rest[most:][:asked], rest[:most][:asked])

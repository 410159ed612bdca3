"""Temperature, top_k and top_p as columns of numbers, one for each row that is sampled."""

from __future__ import annotations

from collections.abc import Sequence as Batch
from dataclasses import dataclass

import torch

from engine.scheduling.sequence import Sequence

# A mass so large that every point but 0 lies beyond any cumulative sum; not infinite, because 0 times it must be 0.
UNKNOWN = torch.finfo(torch.float64).max


@dataclass(frozen=True, slots=True)
class Filters:
    """One number for each row, [rows, 1]; a ``top_k`` that is off counts the whole vocabulary."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    largest_top_k: int

    def __getitem__(self, rows: list[int]) -> Filters:
        return Filters(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.largest_top_k)


def make_filters(sequences: Batch[Sequence], vocab_size: int, device: torch.device) -> Filters:
    """``top_k`` beyond the vocabulary is the whole vocabulary."""
    sampling = [sequence.request.sampling for sequence in sequences]
    top_k = [min(s.top_k or vocab_size, vocab_size) for s in sampling]

    def column(numbers: list[float]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=device)[:, None]

    return Filters(
        temperature=column([s.temperature for s in sampling]),
        top_k=torch.tensor(top_k, device=device)[:, None],
        top_p=column([s.top_p for s in sampling]),
        largest_top_k=max(top_k),
    )


def scaled(logits: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Logits over temperature, shifted so that each row's largest is 0: the smallest temperature cannot overflow."""
    return (logits - logits.amax(dim=-1, keepdim=True)) / filters.temperature.to(logits.dtype)


def surviving_mass(cumulative: torch.Tensor, total: torch.Tensor, filters: Filters, vocab_size: int) -> torch.Tensor:
    """How much probability top_k and then top_p leave, [rows, 1], in the unit of ``cumulative``.

    ``cumulative`` [rows, width] runs over the tokens in descending order and may stop short of the vocabulary;
    ``total`` is the whole row's mass. top_p keeps the fewest tokens whose share of what top_k left reaches it, at
    least one. ``UNKNOWN`` where a filter cuts beyond the width.
    """
    width = cumulative.shape[1]
    by_top_k = cumulative.gather(1, filters.top_k.clamp(max=width) - 1)
    kept = torch.where(filters.top_k <= width, by_top_k, total.masked_fill(filters.top_k < vocab_size, UNKNOWN))
    reaching = torch.searchsorted(cumulative, filters.top_p * kept)
    nucleus = cumulative.gather(1, reaching.clamp(max=width - 1)).masked_fill(reaching >= width, UNKNOWN)
    return torch.where(filters.top_p < 1, nucleus, kept)

"""Temperature, top_k, top_p and min_p as columns of numbers, one for each row that is sampled."""

from __future__ import annotations

from collections.abc import Sequence as Batch
from dataclasses import dataclass

import torch

from engine.scheduling.sequence import Sequence

# A mass so large that every point but 0 lies beyond any cumulative sum; not infinite, because 0 times it must be 0.
UNKNOWN = torch.finfo(torch.float64).max


@dataclass(frozen=True, slots=True)
class Filters:
    """One number for each row, [rows, 1]; a ``top_k`` that is off counts the whole vocabulary.

    ``min_p`` is None where it is off in all rows. ``most_kept`` is the largest top_k: no row keeps more tokens.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor | None
    most_kept: int

    def __getitem__(self, rows: list[int]) -> Filters:
        min_p = None if self.min_p is None else self.min_p[rows]
        return Filters(self.temperature[rows], self.top_k[rows], self.top_p[rows], min_p, self.most_kept)

    def divisor(self, dtype: torch.dtype) -> torch.Tensor:
        """The temperature as scores are divided by it: no 0, also where the number is too small for their type."""
        return self.temperature.to(dtype).clamp(min=torch.finfo(dtype).tiny)


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
        min_p=column([s.min_p for s in sampling]) if any(s.min_p for s in sampling) else None,
        most_kept=max(top_k),
    )


def scaled(logits: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Logits over temperature, shifted so that each row's largest is 0: the smallest temperature cannot overflow."""
    return (logits - logits.amax(dim=-1, keepdim=True)) / filters.divisor(logits.dtype)


def surviving_mass(
    weights: torch.Tensor, cumulative: torch.Tensor, total: torch.Tensor, filters: Filters, vocab_size: int
) -> torch.Tensor:
    """How much probability top_k, then top_p and then min_p leave, [rows, 1], in the unit of ``weights``.

    ``weights`` [rows, width] are those of the tokens in descending order, from 1, and may stop short of the vocabulary;
    ``cumulative`` are their sums, ``total`` is the whole row's mass. top_p keeps the fewest tokens whose share of what
    top_k left reaches it, at least one. min_p keeps those whose weight is at least this share of the largest one.
    ``UNKNOWN`` where the filters cut beyond the width.
    """
    width = weights.shape[1]
    by_top_k = cumulative.gather(1, filters.top_k.clamp(max=width) - 1)
    kept = torch.where(filters.top_k <= width, by_top_k, total.masked_fill(filters.top_k < vocab_size, UNKNOWN))
    reaching = torch.searchsorted(cumulative, filters.top_p * kept)
    nucleus = cumulative.gather(1, reaching.clamp(max=width - 1)).masked_fill(reaching >= width, UNKNOWN)
    nucleus = torch.where(filters.top_p < 1, nucleus, kept)
    if filters.min_p is None:
        return nucleus
    likely = (weights >= filters.min_p).sum(dim=-1, keepdim=True)
    # At least the first, also in a row of NaN: an index of -1 would end a process that computes on a GPU.
    by_min_p = cumulative.gather(1, likely.clamp(min=1) - 1).masked_fill(likely == width, UNKNOWN)
    # All filters keep the most likely tokens, so the one that keeps the fewest decides. Which one that is stays unknown
    # where min_p and the others cut beyond the width, and where top_p keeps a share of an unknown mass.
    both_beyond = (likely == width) & (filters.min_p > 0) & (nucleus > cumulative[:, -1:])
    undecided = both_beyond | ((filters.top_p < 1) & (kept == UNKNOWN))
    return torch.minimum(nucleus, by_min_p).masked_fill(undecided, UNKNOWN)

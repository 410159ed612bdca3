"""The inverse of the cumulative distribution, exact, at the price of the most likely tokens in nearly all rows.

A full sort of a large vocabulary costs ten times what finding its ``PREFILTER`` largest values does, and the token
drawn is nearly always among them. Rows where that cannot be shown are sorted in full.
"""

from __future__ import annotations

import torch

from engine.sampling.filters import Filters, scaled, surviving_mass
from engine.sampling.ranking import ranked

PREFILTER = 1024
_SMALLEST_WIDTH = 64
_BEYOND = -1


def draw(logits: torch.Tensor, filters: Filters, uniforms: list[float]) -> list[int]:
    """One token for each row of ``logits`` [rows, vocabulary], by the row's own number in [0, 1)."""
    vocab_size = logits.shape[1]
    scores = scaled(logits, filters)
    points = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None]
    tokens = _draw_within(scores, filters, points, _width(filters, vocab_size))
    beyond = [row for row, token in enumerate(tokens) if token == _BEYOND]
    if beyond:
        exact = _draw_within(scores[beyond], filters[beyond], points[beyond], vocab_size)
        for row, token in zip(beyond, exact, strict=True):
            tokens[row] = token
    return tokens


def _width(filters: Filters, vocab_size: int) -> int:
    """One more than the largest top_k where all are small: the extra one shows that nothing equal was cut off."""
    return min(vocab_size, PREFILTER, max(_SMALLEST_WIDTH, filters.largest_top_k + 1))


def _draw_within(scores: torch.Tensor, filters: Filters, points: torch.Tensor, width: int) -> list[int]:
    """Draw from the ``width`` best tokens, most likely first; ``_BEYOND`` for rows whose token may be another."""
    best, columns = ranked(scores, width)
    cumulative = best.double().exp().cumsum(dim=-1)
    if width == scores.shape[1]:
        total = cumulative[:, -1:]
    else:
        # The best score is 0, so its log-probability is the negative logarithm of the mass. A plain sum over a row may
        # be split over threads by the number of rows; log_softmax treats each row alike.
        total = scores.log_softmax(dim=-1).gather(1, columns[:, :1]).double().neg().exp()
    mass = surviving_mass(cumulative, total, filters, scores.shape[1])
    # Below the mass even after rounding, so that the token found has a share in it.
    target = torch.minimum(points * mass, mass.nextafter(torch.zeros_like(mass)))
    place = torch.searchsorted(cumulative, target, right=True)
    inside = place.clamp(max=width - 1)
    tokens = columns.gather(1, inside)
    if width < scores.shape[1]:
        # Tokens equal to the last one that made it in may have been left out: their order is not known here.
        known = (place < width) & (best.gather(1, inside) > best[:, -1:])
        tokens = tokens.masked_fill(~known, _BEYOND)
    result: list[int] = tokens.squeeze(1).tolist()
    return result

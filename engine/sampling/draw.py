"""Draws tokens by the inverse of the cumulative distribution: exact, and rarely looking beyond the most likely tokens.

A full sort of a large vocabulary costs a hundred times what finding its 64 largest values does, and the token drawn is
nearly always among them. Rows for which that cannot be shown are ranked more widely, and finally in full.
"""

from __future__ import annotations

import torch

from engine.sampling.filters import Filters, scaled, surviving_mass
from engine.sampling.ranking import ranked

WIDTHS = (64, 1024)
"""How many tokens are ranked at first, and if these are too few: 0.8 and 5.5 ms for 16 rows of 49,152."""
_BEYOND = -1


def draw(logits: torch.Tensor, filters: Filters, uniforms: list[float]) -> list[int]:
    """One token for each row of ``logits`` [rows, vocabulary], by the row's own number in [0, 1)."""
    scores = scaled(logits, filters)
    points = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None]
    tokens = [_BEYOND] * len(uniforms)
    rows = list(range(len(uniforms)))
    vocab_size = logits.shape[1]
    # One more than any row keeps shows that nothing equal was cut off.
    enough = filters.most_kept + 1
    widths = {max(width, enough) if enough <= WIDTHS[-1] else width for width in WIDTHS}
    for width in sorted({min(width, vocab_size) for width in widths} | {vocab_size}):
        every = len(rows) == len(uniforms)
        drawn = _draw_within(
            scores if every else scores[rows], filters if every else filters[rows], points[rows], width
        )
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
        rows = [row for row in rows if tokens[row] == _BEYOND]
        if not rows:
            break
    return tokens


def _draw_within(scores: torch.Tensor, filters: Filters, points: torch.Tensor, width: int) -> list[int]:
    """Draw from the ``width`` best tokens, most likely first; ``_BEYOND`` for rows whose token may be another."""
    best, columns = ranked(scores, width)
    weights = best.double().exp()
    cumulative = weights.cumsum(dim=-1)
    if width == scores.shape[1]:
        total = cumulative[:, -1:]
    else:
        # The best score is 0, so its log-probability is the negative logarithm of the mass. A plain sum over a row may
        # be split over threads by the number of rows; log_softmax treats each row alike.
        total = scores.log_softmax(dim=-1).gather(1, columns[:, :1]).double().neg().exp()
    mass = surviving_mass(weights, cumulative, total, filters, scores.shape[1])
    # Below the mass even after rounding, so that the token found has a share in it.
    target = torch.minimum(points * mass, mass.nextafter(torch.zeros_like(mass)))
    place = torch.searchsorted(cumulative, target, right=True)
    inside = place.clamp(max=width - 1)
    tokens = columns.gather(1, inside)
    if width < scores.shape[1]:
        # Tokens with the same score as the last one may have been left out: their order is not known here.
        known = (place < width) & (best.gather(1, inside) > best[:, -1:])
        tokens = tokens.masked_fill(~known, _BEYOND)
    result: list[int] = tokens.squeeze(1).tolist()
    return result

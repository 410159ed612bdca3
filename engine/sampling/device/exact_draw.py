"""Draws tokens by the inverse of the cumulative distribution: exact, and rarely looking beyond the most likely tokens.

A full sort of a large vocabulary costs a hundred times what finding its 64 largest values does, and the token drawn is
nearly always among them. Rows for which that cannot be shown are ranked more widely, and finally in full.
"""

from __future__ import annotations

import torch

from engine.sampling.device.filters import Filters, scaled, surviving_mass
from engine.sampling.device.ranking import ranked

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
    # The sums of all weights stand for the mass where all are ranked.
    mass = row_mass(scores, columns[:, :1]) if width < scores.shape[1] else None
    tokens, known = draw_ranked(best, columns, mass, filters, points, scores.shape[1])
    result: list[int] = tokens.masked_fill(~known, _BEYOND).squeeze(1).tolist()
    return result


def row_mass(scores: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """The sum of the weights of each whole row [rows, 1]; ``top`` are the columns of its best tokens.

    The best score is 0, so its log-probability is the negative logarithm of the mass. A plain sum over a row may be
    split over threads by the number of rows; log_softmax treats each row alike.
    """
    return scores.log_softmax(dim=-1).gather(1, top).double().neg().exp()


def draw_ranked(
    best: torch.Tensor,
    columns: torch.Tensor,
    mass: torch.Tensor | None,
    filters: Filters,
    points: torch.Tensor,
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each row out of its best ones, and whether it is certain: two tensors [rows, 1].

    ``best`` [rows, width] are scores in descending order, ``columns`` their tokens. ``mass`` is that of each whole row;
    None where the best tokens have all of it, or no row asks for more of it than they have. Reads no number on the
    host.
    """
    width = best.shape[1]
    weights = best.double().exp()
    cumulative = weights.cumsum(dim=-1)
    kept = surviving_mass(weights, cumulative, cumulative[:, -1:] if mass is None else mass, filters, vocab_size)
    # Below the mass even after rounding, so that the token found has a share in it.
    target = torch.minimum(points * kept, kept.nextafter(torch.zeros_like(kept)))
    place = torch.searchsorted(cumulative, target, right=True)
    inside = place.clamp(max=width - 1)
    if width == vocab_size:
        return columns.gather(1, inside), torch.ones_like(inside, dtype=torch.bool)
    # Tokens with the same score as the last one may have been left out: their order is not known here.
    return columns.gather(1, inside), (place < width) & (best.gather(1, inside) > best[:, -1:])

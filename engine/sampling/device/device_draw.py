"""The choice of a batch's tokens as tensor operations alone: nothing waits for the device, so it can be recorded.

The arithmetic is that of ``draw``, from one fixed number of best tokens. Rows whose token may lie beyond them are
marked, and are drawn again where they are read.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch

from engine.sampling.device.exact_draw import WIDTHS, draw_ranked, row_mass
from engine.sampling.device.filters import Filters
from engine.sampling.device.ranking import in_order

WIDTH = WIDTHS[0] + 1
"""How many tokens are ranked. One more than the largest top_k for which that is enough, see ``draw``."""
BEYOND, NOT_FINITE = 1, 2
"""Marks of a row: its token may be another; its largest score is not finite, so that there is none."""
COLUMNS = ("temperature", "top_k", "top_p", "min_p", "point")
"""What ``choose`` takes for each row, as float64; top_k is at least 1, and the vocabulary where it is off."""


class Kind(NamedTuple):
    """What the rows of a batch need, each at the cost of some kernels.

    Without ``draws`` every row takes its most likely token. Without ``whole_mass`` no row that draws has a top_k of the
    width or more, without ``min_p`` none has that filter.
    """

    draws: bool = True
    whole_mass: bool = True
    min_p: bool = True


# Maxima of this many scores each tell where the best tokens are: ranking them reads the scores once, topk five times.
_PART = 128


def choose(scores: torch.Tensor, settings: torch.Tensor, kind: Kind, width: int = WIDTH) -> torch.Tensor:
    """The token of each row of ``scores`` [rows, vocabulary] and its marks: int64 [rows, 2].

    ``settings`` are float64 [rows, columns], and no row may need what ``kind`` lacks. A token is one of the vocabulary
    even where marked.
    """
    vocab_size = scores.shape[1]
    part = gcd(vocab_size, _PART)
    parts = scores.view(len(scores), -1, part)
    maxima = parts.amax(dim=-1)
    largest = maxima.amax(dim=-1, keepdim=True)
    # A difference to itself is 0, but that of an infinity and of NaN is NaN.
    marks = (largest - largest != 0) * NOT_FINITE
    # argmax takes the first of equals, which is the lowest id.
    first = maxima.argmax(dim=-1, keepdim=True)
    tokens = first * part + parts.gather(1, first[:, :, None].expand(-1, -1, part)).argmax(dim=-1)
    if kind.draws:
        temperature, top_k, top_p, min_p, points = settings[:, :, None].unbind(1)
        is_drawn = temperature > 0
        temperature = temperature.masked_fill(~is_drawn, 1)
        filters = Filters(temperature, top_k.long(), top_p, min_p if kind.min_p else None, width - 1)
        divisor = filters.divisor(scores.dtype)
        values, columns = _best(scores, parts, maxima, min(width, vocab_size))
        # Division keeps the order of scores or makes equals of neighbours, so it changes nothing in who is best.
        best, columns = in_order((values - largest) / divisor, columns)
        mass = None
        if kind.whole_mass and width < vocab_size:
            mass = row_mass((scores - largest).div_(divisor), columns[:, :1])
        drawn, known = draw_ranked(best, columns, mass, filters, points, vocab_size)
        tokens = torch.where(is_drawn, drawn, tokens)
        marks = marks + (is_drawn & ~known) * BEYOND
    return torch.cat((tokens, marks), dim=1)


def _best(
    scores: torch.Tensor, parts: torch.Tensor, maxima: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``width`` largest scores of each row and their columns, in any order.

    All scores above the last of them lie in the parts with the largest maxima, and these are no more than ``width``.
    """
    part = parts.shape[2]
    if part == 1 or parts.shape[1] <= width:
        values, columns = scores.topk(width, sorted=False)
        return values, columns
    chosen = maxima.topk(width, sorted=False).indices
    candidates = parts.gather(1, chosen[:, :, None].expand(-1, -1, part)).flatten(1)
    values, places = candidates.topk(width, sorted=False)
    return values, chosen.gather(1, places // part) * part + places % part

"""How far apart two computations of the same numbers are, and how far rounding may bring them."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isnan

import torch

Tolerance = Mapping[torch.dtype, float]
"""How far apart results may be, as a share of the largest number, by the type that they are computed in."""

ROUNDING: Tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""One rounding of the type: the same operations in the same order, rounded at different points."""

REORDERED_SUMS: Tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Some steps of the type's precision: the same products, summed in another order."""


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest expected number; infinite if shapes differ, and for NaN."""
    if found.shape != expected.shape:
        return inf
    found, expected = found.float(), expected.float()
    apart = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return inf if isnan(apart) else apart

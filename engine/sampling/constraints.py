"""Masks: the tokens that a row must not take get a probability of zero."""

from __future__ import annotations

from collections.abc import Sequence as Batch
from math import inf

import torch

from engine.masks import Mask


def constrained(logits: torch.Tensor, masks: Batch[Mask | None]) -> torch.Tensor:
    """``logits`` [rows, vocabulary], minus infinity where a row's mask lacks the token; None allows all.

    Returns ``logits`` itself where no row has a mask. Plain tensor operations: llguidance's own function is compiled by
    torch at its first use, which takes seconds.
    """
    rows = [row for row, mask in enumerate(masks) if mask is not None]
    if not rows:
        return logits
    packed = bytearray().join(mask for mask in masks if mask is not None)
    bits = torch.frombuffer(packed, dtype=torch.uint8).to(logits.device).view(len(rows), -1, 1)
    powers = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=logits.device)
    forbidden = (bits & powers).eq(0).flatten(1)[:, : logits.shape[1]]
    if len(rows) == len(masks):
        return logits.masked_fill(forbidden, -inf)
    result = logits.clone()
    result[rows] = logits[rows].masked_fill(forbidden, -inf)
    return result

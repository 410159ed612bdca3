"""Masks: the tokens that a row must not take get a probability of zero."""

from __future__ import annotations

from collections.abc import Sequence as Batch
from functools import cache
from math import inf

import torch
from torch.nn.functional import embedding

from engine.constraints.masks import Mask


def constrained(logits: torch.Tensor, masks: Batch[Mask | None]) -> torch.Tensor:
    """``logits`` [rows, vocabulary], minus infinity where a row's mask lacks the token; None allows all.

    Returns ``logits`` itself where no row has a mask. Plain tensor operations: llguidance's own function is compiled by
    torch at its first use, which takes seconds. Each byte of a mask is looked up as the eight numbers to add: for 16
    rows of 49,152 that takes 0.3 ms, unpacking the bits 3.4 ms.
    """
    rows = [row for row, mask in enumerate(masks) if mask is not None]
    if not rows:
        return logits
    packed = bytearray().join(mask for mask in masks if mask is not None)
    added = ruling_out(torch.frombuffer(packed, dtype=torch.uint8).to(logits.device).view(len(rows), -1), logits)
    if len(rows) == len(masks):
        return logits + added
    result = logits.clone()
    result[rows] += added
    return result


def ruling_out(bits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """What the masks ``bits`` (uint8 [masks, bytes]) add to the rows of ``logits`` [masks, vocabulary]."""
    return embedding(bits.int(), _added(logits.device)).flatten(1)[:, : logits.shape[1]]


@cache
def _added(device: torch.device) -> torch.Tensor:
    """For each byte, what its bits, the lowest first, add to the logits of their tokens [256, 8]."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return torch.zeros(256, 8).masked_fill(bits == 0, -inf).to(device)

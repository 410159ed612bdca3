"""Masks on the device: the tokens that a row must not take get a probability of zero."""

from __future__ import annotations

from functools import cache
from math import inf

import torch
from torch.nn.functional import embedding


def ruling_out(bits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """What the masks ``bits`` (uint8 [masks, bytes]) add to the rows of ``logits`` [masks, vocabulary].

    Plain tensor operations: llguidance's own function is compiled by torch at its first use, which takes seconds. Each
    byte of a mask is looked up as the eight numbers to add.
    """
    return embedding(bits.int(), _added(logits.device)).flatten(1)[:, : logits.shape[1]]


@cache
def _added(device: torch.device) -> torch.Tensor:
    """For each byte, what its bits, the lowest first, add to the logits of their tokens [256, 8]."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return torch.zeros(256, 8).masked_fill(bits == 0, -inf).to(device)

"""Masks: the tokens that a row must not take get a probability of zero."""

from __future__ import annotations

from collections.abc import Sequence as Batch
from math import inf

import numpy as np

from engine.constraints.masks import Mask

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_ADDED = np.where(_BITS, np.float32(0), np.float32(-inf))
"""For each byte, what its bits, the lowest first, add to the logits of their tokens [256, 8]."""


def constrained(logits: np.ndarray, masks: Batch[Mask | None]) -> np.ndarray:
    """``logits`` [rows, vocabulary], minus infinity where a row's mask lacks the token; None allows all.

    Returns ``logits`` itself where no row has a mask. Each byte of a mask is looked up as the eight numbers to add, so
    that NaN stays NaN.
    """
    if all(mask is None for mask in masks):
        return logits
    result = logits.copy()
    for row, mask in zip(result, masks, strict=True):
        if mask is not None:
            row += _ADDED.take(np.frombuffer(mask, np.uint8), axis=0).reshape(-1)[: len(row)]
    return result

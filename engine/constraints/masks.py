"""Which tokens may come next, one bit each: token ``i`` is bit ``i % 8`` of byte ``i // 8``. No torch."""

from __future__ import annotations

from collections.abc import Iterable

Mask = bytes


def only(token_ids: Iterable[int], vocab_size: int) -> Mask:
    """Nothing but these tokens."""
    return also(bytes(_num_bytes(vocab_size)), token_ids)


def all_but(token_ids: Iterable[int], vocab_size: int) -> Mask:
    """Every token but these."""
    return without(b"\xff" * _num_bytes(vocab_size), token_ids)


def also(mask: Mask, token_ids: Iterable[int]) -> Mask:
    """The mask's tokens and these; ids outside the vocabulary are left out."""
    bits = bytearray(mask)
    for token_id in token_ids:
        if token_id // 8 < len(bits):
            bits[token_id // 8] |= 1 << token_id % 8
    return bytes(bits)


def without(mask: Mask, token_ids: Iterable[int]) -> Mask:
    """The mask's tokens except these; ids outside the vocabulary are left out."""
    bits = bytearray(mask)
    for token_id in token_ids:
        if token_id // 8 < len(bits):
            bits[token_id // 8] &= ~(1 << token_id % 8)
    return bytes(bits)


def allows(mask: Mask, token_id: int) -> bool:
    """Whether this token may come next."""
    return bool(mask[token_id // 8] >> token_id % 8 & 1)


def is_empty(mask: Mask) -> bool:
    """Whether no token may come next."""
    return not mask.strip(b"\0")


def _num_bytes(vocab_size: int) -> int:
    return (vocab_size + 7) // 8

"""Masks as sets of token ids."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.constraints import masks
from engine.constraints.masks import Mask

VOCAB = 37
some = st.sets(st.integers(0, VOCAB - 1))


def held(mask: Mask) -> set[int]:
    return {token for token in range(VOCAB) if masks.allows(mask, token)}


@given(some, some)
def test_masks_are_sets(left: set[int], right: set[int]) -> None:
    assert held(masks.only(left, VOCAB)) == left
    assert held(masks.all_but(left, VOCAB)) == set(range(VOCAB)) - left
    assert held(masks.also(masks.only(left, VOCAB), right)) == left | right
    assert held(masks.without(masks.only(left, VOCAB), right)) == left - right


def test_ids_outside_the_vocabulary_are_left_out() -> None:
    assert masks.all_but([1000], VOCAB) == masks.all_but([], VOCAB)
    assert masks.also(masks.only([3], VOCAB), [1000]) == masks.only([3], VOCAB)

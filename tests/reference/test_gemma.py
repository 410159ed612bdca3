"""The real Gemma 3 270M: sliding windows with real weights, beyond the window."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.paged import PagedModel, plain_logits, plain_model
from tokenizers import Tokenizer

pytestmark = [pytest.mark.reference, pytest.mark.timeout(900)]

WINDOW = 512
# The logits run to 34 and come from a residual stream of up to 1e5: rounding alone moves them by some 2e-5.
TOLERANCE = 1e-3


def test_a_prompt_longer_than_the_window_equals_a_plain_forward(gemma_model: Path) -> None:
    text = " ".join(f"The {i}th house of the street is number {i * i}, and somebody lives there." for i in range(60))
    tokens = Tokenizer.from_file(str(gemma_model / "tokenizer.json")).encode(text).ids[: WINDOW + 60]
    assert len(tokens) == WINDOW + 60
    expected = plain_logits(plain_model(gemma_model), tokens)
    paged = PagedModel(gemma_model, num_blocks=64, block_size=16)
    found = paged.run([tokens], max_chunk=200)[0]
    beyond = [index for index in found if index > WINDOW]
    assert beyond, "no logits were compared beyond the window"
    for index, row in found.items():
        assert (row - expected[index]).abs().max().item() < TOLERANCE

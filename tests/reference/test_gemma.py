"""The real Gemma 3 270M, by torch and by C code: sliding windows with real weights, beyond the window."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.native import NativeModel, compile_once
from support.paged import PagedModel, plain_logits, plain_model
from tokenizers import Tokenizer

pytestmark = [pytest.mark.reference, pytest.mark.timeout(900)]

WINDOW = 512
# The logits run to 34 and come from a residual stream of up to 1e5: rounding alone moves them by some 2e-5.
TOLERANCE = 1e-3


code = pytest.fixture(autouse=True)(compile_once)


@pytest.mark.parametrize("kind", [PagedModel, NativeModel])
def test_a_prompt_longer_than_the_window_equals_a_plain_forward(gemma_model: Path, kind: type[PagedModel]) -> None:
    text = " ".join(f"The {i}th house of the street is number {i * i}, and somebody lives there." for i in range(60))
    tokens = Tokenizer.from_file(str(gemma_model / "tokenizer.json")).encode(text).ids[: WINDOW + 60]
    assert len(tokens) == WINDOW + 60
    expected = plain_logits(plain_model(gemma_model), tokens)
    paged = kind(gemma_model, block_size=16, max_context=1024)
    found = paged.run([tokens], max_chunk=200)[0]
    beyond = [index for index in found if index > WINDOW]
    assert beyond, "no logits were compared beyond the window"
    for index, row in found.items():
        assert (row - expected[index]).abs().max().item() < TOLERANCE

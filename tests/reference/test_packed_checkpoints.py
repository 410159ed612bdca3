"""Checkpoints whose weights stay packed give the logits of a plain forward with their numbers, in chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.native import NativeModel, compile_once
from support.paged import MOE_TOLERANCE, TOLERANCE, PagedModel, apart_in_chunks, plain_model, texts
from support.published import published_fp8, published_mxfp4, saved_small

pytestmark = pytest.mark.reference

pytest.fixture(autouse=True)(compile_once)

MIXTURES = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
}


@pytest.mark.parametrize(
    ("model_type", "publish"),
    [("llama", published_fp8), ("qwen3_moe", published_fp8), ("gpt_oss", published_mxfp4)],
    ids=["FP8", "FP8, experts singly", "MXFP4, experts in stacks"],
)
def test_published_weights(tmp_path: Path, model_type: str, publish: Callable[[Path], Path]) -> None:
    folder = saved_small(tmp_path / "m", model_type, **MIXTURES.get(model_type, {}))
    plain = plain_model(publish(folder))
    tolerance = MOE_TOLERANCE if model_type in MIXTURES else TOLERANCE
    assert apart_in_chunks(PagedModel(folder), plain, texts(), (4, 64)) < tolerance


def test_fp8_in_the_native_forward(tmp_path: Path) -> None:
    folder = saved_small(tmp_path / "m", "qwen3", tie_word_embeddings=True)
    plain = plain_model(published_fp8(folder))
    assert apart_in_chunks(NativeModel(folder), plain, texts(), (4, 64)) < TOLERANCE

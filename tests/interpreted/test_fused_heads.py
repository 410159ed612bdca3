"""Norms of heads fused with their rotation against the model's own code, and which attentions are left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.paged import lively_model_folder
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RMSNorm

from engine.api.engine import EngineConfig
from engine.fused.heads import FusedAttention, FuseHeads
from engine.fused.ops import FusedNorm, FuseNorms, rotated
from engine.model.loader import LoadedModel, load_model
from engine.model.rewrites import apply_rewrites


def fused(model: LoadedModel) -> list[bool]:
    apply_rewrites(model, [FuseNorms()])
    count = apply_rewrites(model, [FuseHeads()])
    found = [isinstance(vars(layer.self_attn).get("forward"), FusedAttention) for layer in model.module.model.layers]
    assert count == sum(found)
    return found


def qwen3(path: Path) -> LoadedModel:
    folder = lively_model_folder(path, "qwen3", num_hidden_layers=2)
    return load_model(EngineConfig(path=str(folder), device="cpu", dtype="float32"), lambda stage, done: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", [16, 20])
def test_norms_then_rotations(size: int, dtype: torch.dtype) -> None:
    originals = [Qwen3RMSNorm(size, eps=1e-5).to(dtype) for _ in range(2)]
    for norm in originals:
        nn.init.normal_(norm.weight)
    q_norm, k_norm = (FusedNorm(norm, 1e-5, 0.0, True) for norm in originals)
    q, k = torch.randn(1, 4, 3, size).to(dtype), torch.randn(1, 3, 2, size).to(dtype).transpose(1, 2)
    cos, sin = torch.randn(1, 3, size).to(dtype), torch.randn(1, 3, size).to(dtype)
    with torch.inference_mode():
        expected = apply_rotary_pos_emb(originals[0](q), originals[1](k), cos, sin)
        for one, other in zip(rotated(q, k, cos, sin, (q_norm, k_norm)), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3 if dtype == torch.float16 else 1e-5)


def test_attentions_that_do_more_or_ask_for_more_are_left_alone(tmp_path: Path) -> None:
    class Scaled(Qwen3Attention):
        def forward(self, *args: Any, **named: Any) -> Any:
            found, weights = super().forward(*args, **named)
            return found * 1.01, weights

    model = qwen3(tmp_path)
    first, second = model.module.model.layers
    first.self_attn.__class__ = Scaled
    assert fused(model) == [False, True]
    # What an attention asks of its backend is that of the probe, and compared too.
    model = qwen3(tmp_path)
    first, second = model.module.model.layers
    second.self_attn.scaling *= 2
    assert fused(model) == [True, False]


def test_norms_that_differ_in_more_than_weights_are_left_alone(tmp_path: Path) -> None:
    model = qwen3(tmp_path)
    first, second = model.module.model.layers
    first.self_attn.k_norm.variance_epsilon = 1e-3
    second.self_attn.q_norm = nn.Identity()
    assert fused(model) == [False, False]

"""Whole models through the Triton backend against plain transformers forwards: what each family asks of its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.paged import PagedModel, lively_model_folder, plain_logits, plain_model

from engine.attention.triton_paged import TritonAttention

TOLERANCE = 1e-4
HYBRID = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {**HYBRID, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0},
    "gpt_oss": {**HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma4_text": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 32,
    },
    # One text is rotated by the short factors, two by the long ones.
    "phi3": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1 + 0.05 * i for i in range(8)],
            "long_factor": [2 + 0.7 * i for i in range(8)],
            "original_max_position_embeddings": 16,
        },
        "original_max_position_embeddings": 16,
    },
    "deepseek_v2": {
        "hidden_size": 60,
        "first_k_dense_replace": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "q_lora_rank": 24,
        "kv_lora_rank": 20,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 10,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mixture_of_chunks_equals_a_plain_forward(family: str, tmp_path: Path) -> None:
    folder = lively_model_folder(tmp_path, family, **{"num_hidden_layers": 2, **FAMILIES[family]})
    texts = [[3 + (i * i + shift) % 250 for i in range(length)] for shift, length in ((0, 37), (5, 5), (9, 19))]
    plain = plain_model(folder)
    for found, text in zip(PagedModel(folder, TritonAttention).run(texts), texts, strict=True):
        expected = plain_logits(plain, text)
        assert found, "nothing was compared"
        assert all((row - expected[index]).abs().max() < TOLERANCE for index, row in found.items())

"""Models with recurrent layers at tiny sizes: logits through slots of states equal a plain float32 forward."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paged import PagedModel, lively_model_folder, plain_logits, plain_model

pytestmark = pytest.mark.reference

TOLERANCE = 1e-4
MOE_TOLERANCE = 5e-4
"""Random experts: a difference in the last bits sometimes chooses another one."""
DELTA = {
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**DELTA, **EXPERTS},
    "qwen3_next": {**DELTA, **EXPERTS},
    "olmo_hybrid": DELTA,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"] * 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
    },
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["mamba", "mamba", "mamba", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
}


def _texts() -> list[list[int]]:
    rnd = random.Random(1)
    return [[rnd.randrange(3, 256) for _ in range(length)] for length in (37, 5, 19, 70)]


def _worst(found: dict[int, torch.Tensor], expected: torch.Tensor) -> float:
    assert found, "nothing was compared"
    return max((row - expected[index]).abs().max().item() for index, row in found.items())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def _folder(folders: Path, family: str) -> Path:
    folder = folders / family
    return folder if folder.exists() else lively_model_folder(folder, family, **FAMILIES[family])


def _tolerance(family: str) -> float:
    return MOE_TOLERANCE if "moe" in family or family in ("qwen3_next", "nemotron_h") else TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mixture_of_chunks_equals_a_plain_forward(family: str, folders: Path) -> None:
    folder = _folder(folders, family)
    texts = _texts()
    plain = plain_model(folder)
    expected = [plain_logits(plain, text) for text in texts]
    paged = PagedModel(folder)
    for chunk in (2, 9, 64, 100):
        for found, logits in zip(paged.run(texts, chunk), expected, strict=True):
            assert _worst(found, logits) < _tolerance(family)
    for text, logits in zip(texts, expected, strict=True):
        assert _worst(paged.run([text])[0], logits) < _tolerance(family)

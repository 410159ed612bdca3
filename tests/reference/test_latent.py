"""Models with latent attention at tiny sizes: the cache holds latents, and logits equal those of a plain forward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paged import (
    MOE_TOLERANCE,
    TOLERANCE,
    PagedModel,
    apart,
    apart_after_shared_pages,
    apart_in_chunks,
    lively_model_folder,
    plain_logits,
    plain_model,
    texts,
)
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.mistral4.modeling_mistral4 import Mistral4ForCausalLM

from engine.attention.base import AttentionOptions
from engine.attention.gather import ReferenceAttention
from engine.cache.layout import KVShape

pytestmark = pytest.mark.reference

LATENT, ROTATED = 20, 8
# No two sizes alike, so that none can stand for another.
SIZES: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": LATENT,
    "qk_rope_head_dim": ROTATED,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "head_dim": ROTATED,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
}
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
STRETCHED = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LONGCAT = {"num_layers": 2, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 32, "moe_topk": 2, "zero_expert_num": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": EXPERTS,
    "deepseek_v2 without a rank of queries": {**EXPERTS, "q_lora_rank": None},
    "deepseek_v3": EXPERTS,
    "deepseek_v3 of a stretched context": {**EXPERTS, "rope_parameters": STRETCHED},
    "deepseek_v3 without interleaving": {**EXPERTS, "rope_interleave": False},
    "glm4_moe_lite": EXPERTS,
    "mistral4": {
        **EXPERTS,
        "head_dim": SIZES["qk_nope_head_dim"] + ROTATED,
        "rope_parameters": {**STRETCHED, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 8},
    },
    "longcat_flash": {**LONGCAT, "n_routed_experts": 4},
    "axk1": EXPERTS,
    "youtu": {},
    "minicpm3": {},
}


@pytest.fixture(scope="module", autouse=True)
def mistral4_is_a_language_model() -> Iterator[None]:
    """transformers lists it only as a part of models that see."""
    config = CONFIG_MAPPING["mistral4"]
    listed = AutoModelForCausalLM._model_mapping
    if config in listed:
        yield
        return
    AutoModelForCausalLM.register(config, Mistral4ForCausalLM, exist_ok=True)
    yield
    del listed._extra_content[config]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latent")


def _folder(folders: Path, family: str) -> Path:
    folder = folders / family.replace(" ", "-")
    if not folder.exists():
        lively_model_folder(folder, family.split()[0], **{**SIZES, **FAMILIES[family]})
    return folder


def _tolerance(family: str) -> float:
    return MOE_TOLERANCE if FAMILIES[family] else TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mixture_of_chunks_equals_a_plain_forward(family: str, folders: Path) -> None:
    folder = _folder(folders, family)
    paged = PagedModel(folder)
    assert {tuple(keys.shape[2:]) for keys in paged.cache.keys} == {(1, LATENT + ROTATED)}
    assert paged.cache.values_in_keys == [True] * len(paged.cache.keys)
    assert apart_in_chunks(paged, plain_model(folder), texts(), (2, 4, 9, 64)) < _tolerance(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_pages_equal_a_plain_forward(family: str, folders: Path) -> None:
    folder = _folder(folders, family)
    assert apart_after_shared_pages(PagedModel(folder), plain_model(folder)) < _tolerance(family)


class _ScaledBySize(ReferenceAttention):
    """As if scores were scaled by the size of the keys that are cached."""

    def attend(self, layer: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        return super().attend(layer, query, options._replace(scaling=query.shape[-1] ** -0.5))


class _OnlyLatents(ReferenceAttention):
    """As if the rotated part were not stored."""

    def write_kv(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        keys = keys.clone()
        keys[..., LATENT:] = 0
        super().write_kv(layer, keys, values)


@pytest.mark.parametrize("broken", [_ScaledBySize, _OnlyLatents])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_comparison_sees_what_a_backend_loses(family: str, broken: type[ReferenceAttention], folders: Path) -> None:
    folder = _folder(folders, family)
    found = PagedModel(folder, broken).run(texts())
    assert apart(found[0], plain_logits(plain_model(folder), texts()[0])) > 100 * _tolerance(family)


def test_glm_4_7_flash_leaves_54_kilobytes_a_token(tmp_path: Path) -> None:
    """Its attention in its real shape; of the rest, little."""
    real = CONFIG_MAPPING["glm4_moe_lite"]()
    names = ("num_attention_heads", *SIZES.keys() - {"num_hidden_layers"})
    attention = {name: getattr(real, name) for name in names}
    folder = lively_model_folder(tmp_path, "glm4_moe_lite", **{**EXPERTS, **attention, "num_hidden_layers": 1})
    paged = PagedModel(folder, num_blocks=16)
    (keys,), (values,) = paged.cache.keys, paged.cache.values
    shape = KVShape(keys.shape[2], keys.shape[3], values.shape[3], values_in_keys=paged.cache.values_in_keys[0])
    assert shape == (1, 576, 512, 0, True)
    bfloat16 = torch.bfloat16.itemsize
    assert real.num_hidden_layers * shape.numbers * bfloat16 == 47 * 576 * 2 == 54_144
    heads, key_size = real.num_attention_heads, real.qk_nope_head_dim + real.qk_rope_head_dim
    expanded = KVShape(heads, key_size, real.v_head_dim)
    assert real.num_hidden_layers * expanded.numbers * bfloat16 == 962_560
    text = texts()[0]
    assert apart(paged.run([text])[0], plain_logits(plain_model(folder), text)) < MOE_TOLERANCE

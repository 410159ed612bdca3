"""The most used classes of transformers at small sizes, made from their own defaults: the fates of docs/models.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from support.fates import NATIVE, REFUSED, TORCH, Fate, class_names, find_fate, texts
from support.scaled import scaled_config
from transformers import CONFIG_MAPPING

from engine.native import library

pytestmark = pytest.mark.reference

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
ROW = re.compile(r"^\| (\w+) \| ([^|]+) \| (\w+) \| (.*) \|$", re.MULTILINE)
# Composites of ``test_composites``, the families of ``test_families`` and what ``test_published`` has are not repeated.
SERVED = (
    "AfmoeForCausalLM",
    "AyaVisionForConditionalGeneration",
    "BambaForCausalLM",
    "Cohere2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Dots1ForCausalLM",
    "Ernie4_5ForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "FalconH1ForCausalLM",
    "Gemma3nForCausalLM",
    "Glm4ForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4vForConditionalGeneration",
    "GraniteForCausalLM",
    "GraniteMoeForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "Idefics3ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "LagunaForCausalLM",
    "Llama4ForCausalLM",
    "LlavaForConditionalGeneration",
    "MiMoV2FlashForCausalLM",
    "MiniMaxM2ForCausalLM",
    "Ministral3ForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "OlmoHybridForCausalLM",
    "OlmoeForCausalLM",
    "Qwen2AudioForConditionalGeneration",
    "Qwen2MoeForCausalLM",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "VoxtralForConditionalGeneration",
)
REFUSALS = (
    "BertLMHeadModel",
    "BloomForCausalLM",
    "DiffLlamaForCausalLM",
    "Florence2ForConditionalGeneration",
    "GlmMoeDsaForCausalLM",
    "IdeficsForVisionText2Text",
    "Kosmos2_5ForConditionalGeneration",
    "MiniMaxM3VLForCausalLM",
    "MusicgenForCausalLM",
)


def _rows() -> list[tuple[str, str, str, str]]:
    return ROW.findall(PAGE.read_text("utf-8"))


def _table() -> dict[str, Fate]:
    return {name: Fate(name, what, why) for name, _, what, why in _rows()}


@pytest.fixture(autouse=True)
def code(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled once for all tests of this process."""
    cache = tmp_path_factory.getbasetemp() / "native"
    monkeypatch.setattr("engine.native.build.load_library", lambda _: library.load_library(cache))


@pytest.fixture
def pinned() -> None:
    """Another release has other classes and other sentences."""
    if f"\ntransformers {transformers.__version__}: " not in PAGE.read_text("utf-8"):
        pytest.skip("docs/models.md is about another release of transformers")


@pytest.mark.usefixtures("pinned")
def test_the_table_has_every_class_and_no_other() -> None:
    assert {name: types.split(", ") for name, types, _, _ in _rows()} == class_names()
    assert {what for _, _, what, _ in _rows()} == {NATIVE, TORCH, REFUSED}


def test_small_configurations_keep_what_is_no_size() -> None:
    """Grouped heads, partial rotation, kinds of layers and shared experts; windows that texts are longer than."""
    gemma = scaled_config(CONFIG_MAPPING["gemma3"]).text_config
    assert gemma.layer_types == ["sliding_attention", "full_attention"] * 2
    assert gemma.num_attention_heads // gemma.num_key_value_heads == 2
    assert gemma.sliding_window < len(texts()[0])
    glm = scaled_config(CONFIG_MAPPING["glm4_moe"])
    assert glm.rope_parameters["partial_rotary_factor"] == 0.5
    assert (glm.n_shared_experts, glm.first_k_dense_replace, glm.num_hidden_layers) == (1, 1, 2)
    shared = scaled_config(CONFIG_MAPPING["gemma3n_text"])
    assert shared.num_kv_shared_layers == 2
    assert shared.layer_types == ["sliding_attention", "full_attention"] * 3
    latent = scaled_config(CONFIG_MAPPING["deepseek_v3"])
    assert latent.qk_head_dim == latent.qk_nope_head_dim + latent.qk_rope_head_dim


@pytest.mark.usefixtures("pinned")
@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_served_is_refused_with_the_sentence_of_the_table(name: str) -> None:
    fate = find_fate(name)
    assert fate.what == REFUSED
    assert fate == _table()[name]


@pytest.mark.parametrize("name", SERVED)
def test_a_class_is_computed_like_a_plain_forward(name: str) -> None:
    """Alone, side by side, in every mixture of chunks; a fate says "wrong" where logits are further apart."""
    fate = find_fate(name)
    assert fate.what in (NATIVE, TORCH)
    assert fate == _table()[name]

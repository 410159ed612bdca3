"""Which class of transformers loads a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.scaled import scaled_config
from transformers import CONFIG_MAPPING

from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.model.eligibility import config_of, longest_context, require_eligible, served_class


@pytest.mark.parametrize(
    ("model_type", "named", "served"),
    [
        ("llama", None, "LlamaForCausalLM"),
        ("gemma3", ["Gemma3ForConditionalGeneration"], "Gemma3ForConditionalGeneration"),
        ("gemma3_text", ["Gemma3ForCausalLM"], "Gemma3ForCausalLM"),
        ("mistral3", None, "Mistral3ForConditionalGeneration"),
        ("qwen2_audio", None, "Qwen2AudioForConditionalGeneration"),
        # Both are in a mapping: what the checkpoint names, and else what holds all its weights.
        ("qwen3_5", ["Qwen3_5ForConditionalGeneration"], "Qwen3_5ForConditionalGeneration"),
        ("qwen3_5", None, "Qwen3_5ForConditionalGeneration"),
        ("qwen3_5", ["Qwen3_5ForCausalLM"], "Qwen3_5ForCausalLM"),
        ("qwen3_5_text", None, "Qwen3_5ForCausalLM"),
        ("llama", ["LlamaForSequenceClassification"], "LlamaForCausalLM"),
    ],
)
def test_a_checkpoint_loads_as_what_it_names_or_else_with_its_towers(
    model_type: str, named: list[str] | None, served: str
) -> None:
    assert served_class(CONFIG_MAPPING[model_type](architectures=named)).__name__ == served


def test_what_is_in_no_mapping_is_refused_by_name() -> None:
    with pytest.raises(ModelRefused, match="siglip_vision_model is not a causal language model"):
        served_class(CONFIG_MAPPING["siglip_vision_model"]())


@pytest.mark.parametrize(
    ("named", "model_type"), [("Qwen3_5ForCausalLM", "qwen3_5_text"), ("Qwen3_5ForConditionalGeneration", "qwen3_5")]
)
def test_the_configuration_is_that_of_the_class(named: str, model_type: str, tmp_path: Path) -> None:
    _save_config(tmp_path, {"model_type": "qwen3_5", "architectures": [named]})
    assert config_of(tmp_path).model_type == model_type


def _save_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")


def test_a_context_that_no_configuration_names_has_to_be_set() -> None:
    state_space = CONFIG_MAPPING["mamba"]()
    with pytest.raises(ModelRefused, match="mamba names no max_position_embeddings; set max_context"):
        longest_context(EngineConfig(path=""), state_space)
    assert longest_context(EngineConfig(path="", max_context=4096), state_space) == (4096, "")


def test_a_composite_needs_the_interface_in_its_text_part_only() -> None:
    """Neither class says that it uses it; the decoder of the first is a Llama."""
    require_eligible(scaled_config(CONFIG_MAPPING["deepseek_vl"]))
    with pytest.raises(ModelRefused, match=r"layer 0 of blip \(BlipTextLayer: .*attention interface"):
        require_eligible(scaled_config(CONFIG_MAPPING["blip"]))

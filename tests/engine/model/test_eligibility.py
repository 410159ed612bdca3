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
from engine.model.eligibility import config_of, longest_context, original_context, require_eligible, served_class


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


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(("original", "limit"), [({}, 512), ({"original_max_position_embeddings": 128}, 128)])
def test_the_context_ends_where_a_dynamic_rotation_begins_to_change(original: dict[str, int], limit: int) -> None:
    config = CONFIG_MAPPING["llama"](max_position_embeddings=512, rope_parameters={**DYNAMIC, **original})
    reason = f"its rotary embedding is dynamic: beyond {limit} tokens every further one changes it for all"
    assert longest_context(EngineConfig(path=""), config) == (limit, reason)
    assert longest_context(EngineConfig(path="", max_context=64), config) == (64, "")
    with pytest.raises(ModelRefused, match=f"is {limit + 1}, but llama allows 1 to {limit} tokens.*dynamic"):
        longest_context(EngineConfig(path="", max_context=limit + 1), config)
    assert original_context(config) is None


def test_a_rotation_that_is_called_dynamic_and_is_fixed_limits_nothing() -> None:
    rope = {**DYNAMIC, "alpha": 1000.0}
    config = CONFIG_MAPPING["hunyuan_v1_dense"](max_position_embeddings=512, rope_parameters=rope)
    assert longest_context(EngineConfig(path=""), config) == (512, "")


def test_longrope_limits_nothing_and_names_where_it_changes() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors, "original_max_position_embeddings": 128}
    sizes = {"max_position_embeddings": 512, "head_dim": 16}
    one = CONFIG_MAPPING["llama"](**sizes, rope_parameters=rope)
    assert (longest_context(EngineConfig(path=""), one), original_context(one)) == ((512, ""), 128)
    by_layer = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    text = {**sizes, "rope_parameters": by_layer}
    assert original_context(CONFIG_MAPPING["gemma3"](text_config=text)) == 128


def test_a_composite_needs_the_interface_in_its_text_part_only() -> None:
    """Neither class says that it uses it; the decoder of the first is a Llama."""
    require_eligible(scaled_config(CONFIG_MAPPING["deepseek_vl"]))
    with pytest.raises(ModelRefused, match=r"layer 0 of blip \(BlipTextLayer: .*attention interface"):
        require_eligible(scaled_config(CONFIG_MAPPING["blip"]))

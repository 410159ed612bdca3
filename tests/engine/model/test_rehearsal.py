"""The dry run without weights says what the dry run with weights says, of models that are served and of others."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import SMALL, tiny_model_folder
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DiffLlamaForCausalLM

from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.model import attention_hook, loader
from engine.model.config_file import read_config
from engine.model.latent import keep_latents
from engine.model.probe import probe
from engine.model.rehearsal import LARGEST_BUFFER, rehearse

EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "num_experts": 4, "decoder_sparse_step": 1}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
SERVED = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 16},
    "gemma2": LAYERS,
    "gemma3_text": LAYERS,
    "phi3": {},
    "olmo2": {},
    "qwen3_moe": {**EXPERTS, "mlp_only_layers": []},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "gpt_oss": {**LAYERS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe_lite": LATENT,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8},
}
REFUSED = {
    "bert": {},
    "diffllama": {},
    "doge": {},
    "bloom": {"n_layer": 2, "n_head": 4},
}


def config_of(name: str, changes: dict[str, Any]) -> Any:
    config = CONFIG_MAPPING[name](**{**SMALL, **changes})
    config._attn_implementation = "eager"
    return config


@pytest.mark.parametrize("name", SERVED)
def test_layers_are_seen_as_with_weights(name: str) -> None:
    config = config_of(name, SERVED[name])
    rehearsed = rehearse(config)
    assert rehearsed.undecided == ""
    assert rehearsed.probe is not None
    assert all(weight.is_meta for weight in rehearsed.model.parameters())
    attention_hook.register()
    with torch.random.fork_rng(devices=[]):
        loaded = keep_latents(partial(probe, AutoModelForCausalLM.from_config(config).eval(), config))
    assert rehearsed.probe.states == loaded.states
    for dry, real in zip(rehearsed.probe.layers, loaded.layers, strict=True):
        assert (dry.name, dry.shape, dry.window) == (real.name, real.shape, real.window)
        assert dry.options.scaling == real.options.scaling
    assert rehearsed.probe.vocab_size == loaded.vocab_size


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2", "falcon_h1"])
def test_states_have_the_types_that_they_have_with_weights(name: str, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, name, **SERVED[name])
    loaded = loader.load_model(EngineConfig(path=str(folder), device="cpu", dtype="bfloat16"), lambda *_: None).probe
    rehearsed = rehearse(read_config(folder), torch.bfloat16).probe
    assert rehearsed is not None
    assert rehearsed.states == loaded.states
    assert torch.bfloat16 in {state.dtype for state in loaded.states}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_those_with_weights(name: str) -> None:
    config = config_of(name, REFUSED[name])
    with pytest.raises(ModelRefused) as dry:
        rehearse(config)
    attention_hook.register()
    with torch.random.fork_rng(devices=[]), pytest.raises(ModelRefused) as real:
        probe(AutoModelForCausalLM.from_config(config).eval(), config)
    assert str(real.value) in str(dry.value)
    assert name in str(dry.value).lower()


def test_positions_that_a_model_ignores_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotations are computed, not made up: the same token at the same position must have the same keys."""

    def by_order(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        positions = torch.arange(position_ids.shape[1])[None, :, None].float()
        angles = positions * self.inv_freq
        both = torch.cat([angles, angles], dim=-1)
        return both.cos(), both.sin()

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.forward", by_order)
    with pytest.raises(ModelRefused, match=r"mixes neighbouring tokens or ignores position_ids; decoders with full"):
        rehearse(config_of("llama", {}))


def test_what_needs_values_is_left_to_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_values(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate_proj.weight.abs().max().item()

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", of_values)
    rehearsed = rehearse(config_of("llama", {}))
    assert rehearsed.probe is None
    assert rehearsed.undecided.startswith("LlamaForCausalLM cannot compute a dry run of 4 tokens: ")


def test_the_configuration_stays_as_it_was() -> None:
    config = config_of("qwen3_moe", SERVED["qwen3_moe"])
    before = config.to_json_string(use_diff=False), config._attn_implementation, config._experts_implementation
    rehearse(config)
    assert (
        config.to_json_string(use_diff=False),
        config._attn_implementation,
        config._experts_implementation,
    ) == before


def test_little_memory_is_taken() -> None:
    """Of a model of a hundred billion weights, and of one whose buffers are large."""
    wide = {"hidden_size": 16_384, "intermediate_size": 65_536, "num_attention_heads": 128, "num_hidden_layers": 30}
    config = config_of("llama", {**wide, "num_key_value_heads": 8, "head_dim": 128})
    rehearsed = rehearse(config)
    assert sum(weight.numel() for weight in rehearsed.model.parameters()) > 10**11
    config = config_of("gpt2", {**SERVED["gpt2"], "n_positions": LARGEST_BUFFER})
    buffers = list(rehearse(config).model.buffers())
    assert all(buffer.is_meta or buffer.numel() <= LARGEST_BUFFER for buffer in buffers)


def test_a_model_that_nobody_has_is_refused() -> None:
    with pytest.raises(ModelRefused, match=r"the config.json of llama describes [0-9]+ weights; no model has so many"):
        rehearse(config_of("llama", {"hidden_size": 1 << 22, "intermediate_size": 1 << 22, "num_attention_heads": 64}))


def test_a_large_model_is_rehearsed_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_given: Any, **_more: Any) -> None:
        raise AssertionError("its weights were read")

    config = EngineConfig(path=str(tiny_model_folder(tmp_path, "diffllama")), device="cpu")
    monkeypatch.setattr(DiffLlamaForCausalLM, "from_pretrained", load)
    with pytest.raises(ModelRefused, match="its weights were read"):
        loader.load_model(config, lambda *_: None)
    monkeypatch.setattr(loader, "LARGE", 1)
    with pytest.raises(ModelRefused, match=r"layer model.layers.0.self_attn attends 2 times"):
        loader.load_model(config, lambda *_: None)

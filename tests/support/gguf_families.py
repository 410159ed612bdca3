"""Small models of the families that GGUF files hold, and how llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from support import gguf_changes as changes
from support import gguf_keys as keys
from support.gguf_converter import Keys
from support.tiny import SMALL
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "num_key_value_heads": 4,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
DELTA = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 6}


@dataclass(frozen=True)
class Family:
    """A model of transformers, and how llama.cpp's converter writes it."""

    architecture: str
    model_type: str
    keys: Callable[[Any], Keys] = lambda _config: {}
    change: changes.Change = changes.unchanged
    config: dict[str, Any] = field(default_factory=dict)

    def model(self) -> Any:
        """Small, with random weights that are large enough for all that attention does to matter."""
        without = ("head_dim",) if self.model_type in ("falcon", "deepseek_v2", "deepseek_v3") else ()
        told = {name: value for name, value in {**SMALL, **self.config}.items() if name not in without}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                CONFIG_MAPPING[self.model_type](**told), dtype=torch.float32, attn_implementation="eager"
            )
            weights = [*model.named_parameters(), *model.named_buffers()]
            with torch.no_grad():
                for name, weight in weights:
                    if name.endswith(("correction_bias", "layer_scalar")) or (weight.ndim == 1 and "inv_" not in name):
                        weight.add_(torch.randn_like(weight) * 0.1)
                    elif weight.ndim > 1 and (spread := float(weight.std())) > 0:
                        weight.mul_(0.12 / spread)
        return model.eval()


def llama3(factor: float) -> dict[str, Any]:
    """The rotation of Llama 3.1 and later ones."""
    told = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, **told}


FAMILIES = {
    "llama": Family("llama", "llama", keys.rotated, changes.permuted),
    "llama with biases, tied": Family(
        "llama",
        "llama",
        keys.rotated,
        changes.permuted,
        {"attention_bias": True, "mlp_bias": False, "tie_word_embeddings": True},
    ),
    "llama 3.1": Family("llama", "llama", keys.rotated, changes.llama3_factors, {"rope_parameters": llama3(8.0)}),
    "llama 3.2": Family("llama", "llama", keys.rotated, changes.llama3_factors, {"rope_parameters": llama3(32.0)}),
    "linear": Family(
        "llama",
        "llama",
        keys.rotated,
        changes.permuted,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "qwen2": Family("qwen2", "qwen2"),
    "qwen3": Family("qwen3", "qwen3", config={"head_dim": 32}),
    "qwen3 with yarn": Family("qwen3", "qwen3", config={"head_dim": 32, "rope_parameters": YARN}),
    "qwen3vl": Family(
        "qwen3vl",
        "qwen3",
        lambda _config: {"n_deepstack_layers": 0, "rope.dimension_sections": [6, 5, 5, 0]},
        config={"head_dim": 32},
    ),
    "phi3": Family("phi3", "phi3", keys.phi3, changes.longrope, {"sliding_window": None}),
    "phi3 with longrope": Family(
        "phi3",
        "phi3",
        keys.phi3,
        changes.longrope,
        {
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.1, 1.3, 1.7],
                "long_factor": [1.0, 2.0, 4.0, 8.0],
            },
        },
    ),
    "granite": Family(
        "granite",
        "granite",
        keys.granite,
        changes.permuted,
        {"attention_multiplier": 0.125, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 1.5},
    ),
    "smollm3": Family("smollm3", "smollm3", keys.rotated, changes.permuted, {"num_hidden_layers": 5}),
    "olmo2": Family("olmo2", "olmo2"),
    "olmo3": Family(
        "olmo2",
        "olmo3",
        keys.pattern,
        config={
            "num_hidden_layers": 4,
            "sliding_window": 8,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "cohere2": Family(
        "cohere2",
        "cohere2",
        lambda config: {
            **keys.window(config),
            **keys.rotated(config),
            "logit_scale": config.logit_scale,
            "rope.scaling.type": "none",
        },
        config={"num_hidden_layers": 4, "sliding_window": 8, "logit_scale": 0.5},
    ),
    "starcoder2": Family("starcoder2", "starcoder2", config={"sliding_window": 4096}),
    "mistral3": Family(
        "mistral3", "mistral", keys.mistral3, changes.permuted, {"head_dim": 32, "sliding_window": None}
    ),
    "ministral3": Family(
        "mistral3",
        "ministral3",
        keys.mistral3,
        changes.permuted,
        {
            "head_dim": 32,
            "rope_parameters": {
                **YARN,
                "original_max_position_embeddings": 16,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "falcon 7b": Family("falcon", "falcon", keys.falcon, changes.falcon),
    "falcon 40b": Family(
        "falcon", "falcon", keys.falcon, changes.falcon, {"new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    "nemotron": Family("nemotron", "nemotron", keys.nemotron, changes.one_added),
    "gemma2": Family(
        "gemma2",
        "gemma2",
        keys.gemma2,
        changes.one_added,
        {**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "tie_word_embeddings": True},
    ),
    "gemma3": Family("gemma3", "gemma3_text", keys.gemma2, changes.one_added, {**GEMMA, "tie_word_embeddings": True}),
    "gemma4 e2b": Family(
        "gemma4",
        "gemma4_text",
        keys.gemma4,
        changes.gemma4,
        {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
            "head_dim": 16,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 320,
            "sliding_window": 8,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma4 26b": Family(
        "gemma4",
        "gemma4_text",
        keys.gemma4,
        changes.gemma4,
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "head_dim": 16,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 0,
            "sliding_window": 8,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "final_logit_softcapping": 30.0,
        },
    ),
    "mixtral": Family("llama", "mixtral", keys.rotated, changes.permuted, {"num_local_experts": 4}),
    "qwen2moe": Family(
        "qwen2moe", "qwen2_moe", keys.moe, changes.experts, {**MOE, "shared_expert_intermediate_size": 64}
    ),
    "qwen3moe": Family("qwen3moe", "qwen3_moe", keys.moe, changes.experts, {**MOE, "norm_topk_prob": True}),
    "gpt-oss": Family(
        "gpt-oss",
        "gpt_oss",
        keys.gpt_oss,
        changes.gpt_oss,
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    "granitemoe": Family(
        "granitemoe",
        "granitemoe",
        keys.granitemoe,
        changes.granitemoe,
        {"num_local_experts": 4, "attention_multiplier": 0.125, "embedding_multiplier": 2.0},
    ),
    "granitemoe with a shared expert": Family(
        "granitemoe",
        "granitemoeshared",
        keys.granitemoe,
        changes.granitemoe,
        {"num_local_experts": 4, "shared_intermediate_size": 32, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "minimax-m2": Family(
        "minimax-m2",
        "minimax_m2",
        keys.minimax,
        changes.experts,
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "glm4moe": Family(
        "glm4moe",
        "glm4_moe",
        keys.glm4moe,
        changes.experts,
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "use_qk_norm": True,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
        },
    ),
    "deepseek v2 lite": Family(
        "deepseek2",
        "deepseek_v2",
        keys.deepseek2,
        changes.deepseek2,
        {**LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_hidden_layers": 27},
    ),
    "deepseek v2": Family(
        "deepseek2",
        "deepseek_v2",
        keys.deepseek2,
        changes.deepseek2,
        {**LATENT, "q_lora_rank": 32, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"},
    ),
    "deepseek v3": Family(
        "deepseek2",
        "deepseek_v3",
        keys.deepseek2,
        changes.deepseek2,
        {
            **LATENT,
            "q_lora_rank": 32,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "nemotron_h": Family(
        "nemotron_h",
        "nemotron_h",
        keys.nemotron_h,
        changes.nemotron_h,
        {
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 16,
            "head_dim": 32,
        },
    ),
    "nemotron_h_moe": Family(
        "nemotron_h_moe",
        "nemotron_h",
        keys.nemotron_h,
        changes.nemotron_h,
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 16,
            "head_dim": 32,
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 64,
            "routed_scaling_factor": 1.5,
        },
    ),
    "lfm2": Family(
        "lfm2",
        "lfm2",
        keys.lfm2,
        changes.lfm2,
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True},
    ),
    "qwen35": Family("qwen35", "qwen3_5_text", keys.qwen35, changes.qwen35, DELTA),
    "qwen35moe": Family(
        "qwen35moe",
        "qwen3_5_moe_text",
        keys.qwen35,
        changes.qwen35,
        {**DELTA, **MOE, "shared_expert_intermediate_size": 64},
    ),
}

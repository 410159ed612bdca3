"""What llama.cpp's converter writes into the header for each family, beside what it writes for all of them."""

from __future__ import annotations

from math import log, sqrt
from typing import Any

from support.gguf_changes import head_sizes
from support.gguf_converter import Keys


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotated(config: Any) -> Keys:
    return {"rope.dimension_count": int(head_size(config) * config.rope_parameters.get("partial_rotary_factor", 1.0))}


def granite(config: Any) -> Keys:
    names = {"attention": "attention.scale", "embedding": "embedding_scale", "residual": "residual_scale"}
    found = {key: float(getattr(config, f"{name}_multiplier")) for name, key in names.items()}
    return {**found, "logit_scale": float(config.logits_scaling), **rotated(config)}


def granitemoe(config: Any) -> Keys:
    shared = getattr(config, "shared_intermediate_size", 0)
    return {**granite(config), **({"expert_shared_feed_forward_length": shared} if shared else {})}


def phi3(config: Any) -> Keys:
    told = config.rope_parameters
    original = told.get("original_max_position_embeddings", config.original_max_position_embeddings)
    keys = {**rotated(config), "rope.scaling.original_context_length": original}
    scale = config.max_position_embeddings / original
    if told["rope_type"] == "longrope":
        keys["rope.scaling.attn_factor"] = sqrt(1 + log(scale) / log(original))
    return {**keys, "attention.sliding_window": config.sliding_window or 0}


def window(config: Any) -> Keys:
    return {"attention.sliding_window": config.sliding_window}


def gemma2(config: Any) -> Keys:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    return {**window(config), **{name: float(found) for name in caps if (found := getattr(config, name, None))}}


def pattern(config: Any) -> Keys:
    flags = [kind == "sliding_attention" for kind in config.layer_types]
    return {**window(config), "attention.sliding_window_pattern": flags}


def mistral3(config: Any) -> Keys:
    told = config.rope_parameters
    keys = rotated(config)
    if told["rope_type"] != "yarn":
        return keys
    beta = told["llama_4_scaling_beta"]
    return {**keys, "rope.scaling.yarn_log_multiplier": told["mscale_all_dim"], "attention.temperature_scale": beta}


def falcon(config: Any) -> Keys:
    groups = config.num_kv_heads if config.new_decoder_architecture else 1
    width = {"feed_forward_length": config.ffn_hidden_size, "attention.head_count_kv": groups}
    return {**width, "attention.layer_norm_epsilon": config.layer_norm_epsilon, "context_length": 512}


def nemotron(config: Any) -> Keys:
    return {"attention.layer_norm_epsilon": config.norm_eps, **rotated(config), "rope.scaling.type": "none"}


def moe(config: Any) -> Keys:
    keys = {"expert_feed_forward_length": config.moe_intermediate_size}
    shared = getattr(config, "shared_expert_intermediate_size", None)
    return {**keys, **({"expert_shared_feed_forward_length": shared} if shared else {})}


def gpt_oss(config: Any) -> Keys:
    return {**window(config), "expert_feed_forward_length": config.intermediate_size}


def minimax(config: Any) -> Keys:
    sizes = {"expert_feed_forward_length": config.intermediate_size, "expert_gating_func": 2}
    return {**rotated(config), **sizes}


def beside_shared(config: Any) -> Keys:
    return {**routed(config), "leading_dense_block_count": config.first_k_dense_replace}


def routed(config: Any) -> Keys:
    return {
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_count": config.n_routed_experts,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
    }


def glm4moe(config: Any) -> Keys:
    return {**beside_shared(config), **rotated(config), "expert_gating_func": 2, "nextn_predict_layers": 0}


def deepseek2(config: Any) -> Keys:
    latent, rotated = config.kv_lora_rank, config.qk_rope_head_dim
    keys = {
        **beside_shared(config),
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rotated,
        "attention.value_length": latent,
        "attention.key_length_mla": config.qk_nope_head_dim + rotated,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": rotated,
        "expert_gating_func": 2 if config.model_type == "deepseek_v3" else 1,
    }
    if config.q_lora_rank is not None:
        keys["attention.q_lora_rank"] = config.q_lora_rank
    if scale := config.rope_parameters.get("mscale_all_dim"):
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * scale
    return keys


def gemma4(config: Any) -> Keys:
    local, size = head_sizes(config)
    keys = {
        **pattern(config),
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.key_length_swa": local,
        "attention.value_length_swa": local,
        "rope.dimension_count": size,
        "rope.dimension_count_swa": local,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
    }
    first = config.num_hidden_layers - config.num_kv_shared_layers
    if config.use_double_wide_mlp:
        keys["feed_forward_length"] = [
            config.intermediate_size * (1 + (place >= first)) for place in range(config.num_hidden_layers)
        ]
    if config.final_logit_softcapping:
        keys["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if config.enable_moe_block:
        keys["expert_feed_forward_length"] = config.moe_intermediate_size
    counts = [config.per_layer_config[place].num_key_value_heads for place in range(config.num_hidden_layers)]
    keys["attention.head_count_kv"] = counts if config.attention_k_eq_v else counts[0]
    return keys


def nemotron_h(config: Any) -> Keys:
    kinds = config.layers_block_type
    wide = config.moe_intermediate_size if "moe" in kinds else config.intermediate_size
    keys = {
        "block_count": len(kinds),
        "feed_forward_length": [wide if kind in ("mlp", "moe") else 0 for kind in kinds],
        "attention.head_count_kv": [config.num_key_value_heads if kind == "full_attention" else 0 for kind in kinds],
        "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
        "ssm.conv_kernel": config.conv_kernel,
        "ssm.state_size": config.ssm_state_size,
        "ssm.group_count": config.n_groups,
        "ssm.inner_size": config.mamba_num_heads * config.mamba_head_dim,
        "ssm.time_step_rank": config.mamba_num_heads,
        "rope.scaling.finetuned": False,
    }
    if "moe" not in kinds:  # a dense checkpoint does not tell what its class has for mixtures
        names = ("count", "used_count", "group_count", "group_used_count")
        return {**keys, **{f"expert_{name}": None for name in names}}
    shared = {"expert_shared_feed_forward_length": config.moe_shared_expert_intermediate_size}
    return {**keys, **routed(config), **shared}


def qwen35(config: Any) -> Keys:
    heads = config.linear_num_value_heads
    keys = {
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": heads,
        "ssm.inner_size": heads * config.linear_value_head_dim,
        "full_attention_interval": 4,
        **rotated(config),
    }
    return {**keys, **(moe(config) if hasattr(config, "moe_intermediate_size") else {})}


def lfm2(config: Any) -> Keys:
    heads = [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]
    keys = {"attention.head_count_kv": heads, "shortconv.l_cache": config.conv_L_cache, "vocab_size": config.vocab_size}
    return {**keys, "attention.layer_norm_rms_epsilon": config.norm_eps}

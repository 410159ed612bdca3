"""Architectures of GGUF files with recurrent layers among those of attention."""

from __future__ import annotations

from typing import Any

from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS, LogNegate, Unsqueeze

from engine.gguf.dense import Architecture, Found, decoder, without
from engine.gguf.fields import Fields
from engine.gguf.mixtures import correction, inner, routed, shared_experts, trunk
from engine.gguf.operations import Flatten


def _of_transformers(name: str, model_type: str) -> Architecture:
    """An architecture that transformers describes itself."""

    def describe(fields: Fields) -> Found:
        # Its own reader leaves texts as their number.
        metadata = {
            key: len(value) if isinstance(value, list) and value and isinstance(value[0], str) else value
            for key, value in fields.header.metadata.items()
        }
        found = GGUF_CONFIG_ARCHS[name](metadata, tuple(fields.header.tensors))
        found.pop("model_type")
        return dict(found)

    return Architecture(model_type, describe, GGUF_ARCHS[name])


_LAYERS = {"ssm_in": "linear_attention", "attn_q": "full_attention", "ffn_gate_inp": "moe", "ffn_up": "mlp"}
"""What a layer of Nemotron H is, by a tensor that no other kind has."""


def _layer_types(fields: Fields) -> list[str]:
    tensors = fields.header.tensors
    return [
        next((kind for name, kind in _LAYERS.items() if f"blk.{place}.{name}.weight" in tensors), "mlp")
        for place in range(trunk(fields))
    ]


def _nemotron_h(fields: Fields) -> Found:
    """Layers of Mamba 2, of attention without rotation, and of maps or experts, in any order."""
    found = without(decoder(fields, layerwise=True), "rope_parameters", "num_hidden_layers", "rms_norm_eps")
    kinds = _layer_types(fields)
    heads = fields.count("ssm.time_step_rank")
    mixture: Found = {}
    if "moe" in kinds:
        shared = fields.count("expert_shared_feed_forward_length")
        mixture = {
            **routed(fields, "n_routed_experts"),
            "moe_intermediate_size": inner(fields),
            "moe_shared_expert_intermediate_size": shared,
            "moe_latent_size": fields.count("moe_latent_size", None),
            "n_shared_experts": fields.count("expert_shared_count", 1),
            "norm_topk_prob": fields.flag("expert_weights_norm", True),
            "routed_scaling_factor": fields.real("expert_weights_scale", 1.0),
            "n_group": fields.count("expert_group_count", 1),
            "topk_group": fields.count("expert_group_used_count", 1),
        }
    return {
        **found,
        **mixture,
        "layers_block_type": kinds,
        "layer_norm_epsilon": fields.real("attention.layer_norm_rms_epsilon"),
        "mamba_num_heads": heads,
        "mamba_head_dim": fields.count("ssm.inner_size") // heads,
        "n_groups": fields.count("ssm.group_count"),
        "ssm_state_size": fields.count("ssm.state_size"),
        "conv_kernel": fields.count("ssm.conv_kernel"),
        "use_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in fields.header.tensors),
        "use_bias": any(name.endswith("ssm_in.bias") for name in fields.header.tensors),
        "attention_bias": any(name.endswith("attn_q.bias") for name in fields.header.tensors),
        "mlp_bias": any(name.endswith("ffn_up.bias") for name in fields.header.tensors),
    }


def _nemotron_h_changes(_config: Any) -> list[Any]:
    """``ssm_a`` is -exp(A_log); the kernel of the convolution and what heads have are stored in two dimensions."""
    names = {
        r"^token_embd\.": "model.embeddings.",
        r"^output_norm\.": "model.norm_f.",
        r"^output\.": "lm_head.",
        r"^blk\.": "model.layers.",
        r"\.attn_norm\.": ".norm.",
        r"\.ssm_in\.": ".mixer.in_proj.",
        r"\.ssm_out\.": ".mixer.out_proj.",
        r"\.ssm_conv1d\.": ".mixer.conv1d.",
        r"\.ssm_dt\.bias": ".mixer.dt_bias",
        r"\.ssm_a$": ".mixer.A_log",
        r"\.ssm_d$": ".mixer.D",
        r"\.ssm_norm\.": ".mixer.norm.",
        r"\.attn_(q|k|v)\.": r".mixer.\1_proj.",
        r"\.attn_output\.": ".mixer.o_proj.",
        r"\.ffn_(up|down)\.": r".mixer.\1_proj.",
        r"\.ffn_gate_inp\.": ".mixer.gate.",
        r"\.ffn_(up|down)_exps\.weight": r".mixer.experts.\1_proj",
        r"\.ffn_latent_down\.": ".mixer.fc1_latent_proj.",
        r"\.ffn_latent_up\.": ".mixer.fc2_latent_proj.",
    }
    return [
        *(WeightRenaming(pattern, name) for pattern, name in names.items()),
        *shared_experts(".mixer.shared_experts"),
        correction(".mixer.gate.e_score_correction_bias"),
        WeightConverter(".mixer.A_log", ".mixer.A_log", [LogNegate(), Flatten()]),
        WeightConverter(".mixer.D", ".mixer.D", [Flatten()]),
        WeightConverter(".mixer.norm.weight", ".mixer.norm.weight", [Flatten()]),
        WeightConverter(".mixer.conv1d.weight", ".mixer.conv1d.weight", [Unsqueeze(1)]),
    ]


HYBRIDS = {
    "lfm2": _of_transformers("lfm2", "lfm2"),
    "qwen35": _of_transformers("qwen35", "qwen3_5_text"),
    "qwen35moe": _of_transformers("qwen35moe", "qwen3_5_moe_text"),
    "nemotron_h": Architecture("nemotron_h", _nemotron_h, _nemotron_h_changes),
    "nemotron_h_moe": Architecture("nemotron_h", _nemotron_h, _nemotron_h_changes),
}

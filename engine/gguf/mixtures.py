"""Mixtures of experts in GGUF files: configuration and changes of tensors of each architecture."""

from __future__ import annotations

from typing import Any

from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.integrations.gguf.gguf_conversion_mapping import (
    DENSE_DECODER_RENAMINGS,
    ConcatenateRows,
    Unsqueeze,
)

from engine.gguf.dense import (
    FOUR_NORMS,
    NORM_AFTER_ATTENTION,
    NORMS,
    Architecture,
    Found,
    decoder,
    gemma4,
    has,
    interleaved,
    llama,
    multipliers,
    plain,
    windows,
    without,
)
from engine.gguf.fields import Fields
from engine.gguf.header import Unreadable
from engine.gguf.operations import InterleaveRows, JoinLatents, TransposeNumbers
from engine.gguf.rotation import rotation

SIGMOID = 2
"""llama.cpp's number of the scores of experts that are sigmoids (gguf-py, ``ExpertGatingFuncType``)."""


def routed(fields: Fields, experts: str = "num_experts") -> Found:
    """How many experts there are, by the name ``experts``, and how many see a token."""
    return {experts: fields.count("expert_count"), "num_experts_per_tok": fields.count("expert_used_count")}


def inner(fields: Fields) -> int:
    """The width of an expert, as its tensors have it: not all headers say it."""
    for name, tensor in fields.header.tensors.items():
        if name.endswith("ffn_down_exps.weight"):
            return tensor.shape[-1]
    raise Unreadable("it has no ffn_down_exps.weight, which a mixture of experts needs; use a newer conversion")


def require_scores(fields: Fields, sigmoid: bool) -> None:
    """Refuse scores of experts that the model does not have."""
    told = fields.count("expert_gating_func", SIGMOID if sigmoid else 1)
    if (told == SIGMOID) != sigmoid:
        raise Unreadable(f"the scores of its experts, {told}, are not those of {fields.header.architecture}")


def trunk(fields: Fields) -> int:
    """The number of layers without those that predict further tokens, which are not computed."""
    return fields.layers() - fields.count("nextn_predict_layers", 0)


def _llama(fields: Fields) -> Found:
    """A Llama, or, with experts, a Mixtral."""
    if not fields.count("expert_count", 0):
        return llama(fields)
    return {**decoder(fields), **routed(fields, "num_local_experts"), "model_type": "mixtral", "sliding_window": None}


def _qwen2moe(fields: Fields) -> Found:
    """The scores of the chosen experts are not made to sum to one: published so, and not in the header."""
    shared = fields.header.tensors["blk.0.ffn_down_shexp.weight"].shape[-1]
    sizes = {"moe_intermediate_size": inner(fields), "shared_expert_intermediate_size": shared}
    found = {**without(decoder(fields), "head_dim"), **routed(fields), **sizes}
    return {**found, "norm_topk_prob": False, "qkv_bias": has(fields, "attn_q.bias")}


def _qwen3moe(fields: Fields) -> Found:
    """The scores of the chosen experts sum to one: published so, and not in the header."""
    found = {**decoder(fields), **routed(fields), "moe_intermediate_size": inner(fields)}
    return {**found, "norm_topk_prob": True, "attention_bias": has(fields, "attn_q.bias")}


def _gpt_oss(fields: Fields) -> Found:
    found = {**decoder(fields), **routed(fields, "num_local_experts"), **windows(fields, 2)}
    if found["rope_parameters"]["rope_type"] == "yarn":
        found["rope_parameters"]["truncate"] = False  # as published
    return {**found, "intermediate_size": inner(fields), "attention_bias": has(fields, "attn_q.bias")}


def _granitemoe(fields: Fields) -> Found:
    found = {**llama(fields), **multipliers(fields), **routed(fields, "num_local_experts")}
    found["intermediate_size"] = inner(fields)
    if not has(fields, "ffn_down_shexp.weight"):
        return found
    shared = fields.header.tensors["blk.0.ffn_down_shexp.weight"].shape[-1]
    return {**found, "shared_intermediate_size": shared, "model_type": "granitemoeshared"}


def _minimax_m2(fields: Fields) -> Found:
    require_scores(fields, sigmoid=True)
    return {**decoder(fields), **routed(fields, "num_local_experts"), "intermediate_size": inner(fields)}


def _beside_shared(fields: Fields) -> Found:
    """Of models whose first layers are dense, and whose experts have shared ones beside them."""
    return {
        "num_hidden_layers": trunk(fields),
        "num_nextn_predict_layers": fields.count("nextn_predict_layers", 0),
        "first_k_dense_replace": fields.count("leading_dense_block_count", 0),
        "n_shared_experts": fields.count("expert_shared_count", 0),
        "routed_scaling_factor": fields.real("expert_weights_scale", 1.0),
        "norm_topk_prob": fields.flag("expert_weights_norm", False),
        "moe_intermediate_size": inner(fields),
        **routed(fields, "n_routed_experts"),
    }


def _glm4moe(fields: Fields) -> Found:
    require_scores(fields, sigmoid=True)
    return {
        **decoder(fields),
        **_beside_shared(fields),
        "n_group": fields.count("expert_group_count", 1),
        "topk_group": fields.count("expert_group_used_count", 1),
        "attention_bias": has(fields, "attn_q.bias"),
        "use_qk_norm": has(fields, "attn_q_norm.weight"),
    }


def _deepseek2(fields: Fields) -> Found:
    """DeepSeek V2 with softmax scores of experts, V3 with sigmoids; keys and values are made of latents in both."""
    heads, rotated = fields.count("attention.head_count"), fields.count("rope.dimension_count")
    keys = fields.count("attention.key_length_mla", fields.count("attention.key_length"))
    found = {**without(decoder(fields), "head_dim"), **_beside_shared(fields)}
    sigmoid = any(".exp_probs_b" in name for name in fields.header.tensors)
    require_scores(fields, sigmoid)
    groups = _groups(fields)
    if not sigmoid:
        if found["norm_topk_prob"]:
            raise Unreadable("the scores of its experts are softmaxes that are made to sum to one, which is not read")
        found["topk_method"] = "greedy" if groups["n_group"] == 1 else "group_limited_greedy"
    return {
        **found,
        **groups,
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "num_key_value_heads": heads,
        "q_lora_rank": fields.count("attention.q_lora_rank", None),
        "kv_lora_rank": fields.count("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": keys - rotated,
        "v_head_dim": fields.count("attention.value_length_mla", fields.count("attention.value_length")),
        "rope_parameters": rotation(fields, rotated),
    }


_PUBLISHED_GROUPS = {256: (8, 4), 160: (8, 3)}
"""Groups and how many of them are looked into, by the number of experts: DeepSeek V3 and V2."""


def _groups(fields: Fields) -> Found:
    """Older headers do not say it."""
    count, used = _PUBLISHED_GROUPS.get(fields.count("expert_count"), (1, 1))
    told = fields.count("expert_group_count", count)
    return {"n_group": told, "topk_group": fields.count("expert_group_used_count", used if told == count else told)}


def experts(place: str = ".mlp.experts", gate: str = ".mlp.gate.") -> list[Any]:
    """The experts of a layer, stacked, and what chooses among them."""
    return [
        WeightRenaming(r"\.ffn_gate_inp\.", gate),
        WeightRenaming(r"\.ffn_down_exps\.weight", f"{place}.down_proj"),
        WeightRenaming(r"\.ffn_gate_up_exps\.weight", f"{place}.gate_up_proj"),
        WeightConverter(
            [r"\.ffn_gate_exps\.weight", r"\.ffn_up_exps\.weight"], f"{place}.gate_up_proj", [ConcatenateRows(dim=1)]
        ),
    ]


def shared_experts(place: str) -> list[Any]:
    return [WeightRenaming(rf"\.ffn_{part}_shexp\.", f"{place}.{part}_proj.") for part in ("gate", "up", "down")]


def correction(name: str) -> WeightRenaming:
    """What is added to the scores of experts while some are chosen; older files have the tensor without ``.bias``."""
    return WeightRenaming(r"\.exp_probs_b(\.bias)?$", name)


def beyond(config: Any) -> WeightRenaming:
    """The first layer that predicts a further token, by a name that transformers drops."""
    return WeightRenaming(rf"^blk\.{config.num_hidden_layers}\.", "mtp.")


def _llama_changes(config: Any) -> list[Any]:
    return [*interleaved(config), *experts()]


def _qwen2moe_changes(config: Any) -> list[Any]:
    gate = ".mlp.shared_expert_gate.weight"
    return [
        *plain(config),
        *experts(),
        *shared_experts(".mlp.shared_expert"),
        WeightRenaming(r"\.ffn_gate_inp_shexp\.", ".mlp.shared_expert_gate."),
        WeightConverter(gate, gate, [Unsqueeze(0, expected_ndim=2)]),
    ]


def _qwen3moe_changes(config: Any) -> list[Any]:
    return [*plain(config), *experts()]


def _gpt_oss_changes(_config: Any) -> list[Any]:
    """Experts multiply from the other side, with the rows of gates and ups in turn."""
    parts = [r"\.ffn_gate_exps\.", r"\.ffn_up_exps\."]
    place = ".mlp.experts.gate_up_proj"
    down = ".mlp.experts.down_proj"
    return [
        *DENSE_DECODER_RENAMINGS,
        *NORMS,
        NORM_AFTER_ATTENTION,
        WeightRenaming(r"\.attn_sinks\.weight", ".self_attn.sinks"),
        WeightRenaming(r"\.ffn_gate_inp\.", ".mlp.router."),
        WeightRenaming(r"\.ffn_down_exps\.bias", f"{down}_bias"),
        WeightConverter(r"\.ffn_down_exps\.weight", down, [TransposeNumbers()]),
        WeightConverter([f"{part}weight" for part in parts], place, [InterleaveRows(), TransposeNumbers()]),
        WeightConverter([f"{part}bias" for part in parts], f"{place}_bias", [InterleaveRows()]),
    ]


def _granitemoe_changes(config: Any) -> list[Any]:
    shared = [r"\.ffn_gate_shexp\.weight", r"\.ffn_up_shexp\.weight"]
    return [
        *interleaved(config),
        *experts(".block_sparse_moe.experts", ".block_sparse_moe.router."),
        WeightRenaming(r"\.ffn_down_shexp\.", ".shared_mlp.output_linear."),
        WeightConverter(shared, ".shared_mlp.input_linear.weight", [ConcatenateRows(dim=0)]),
    ]


def _minimax_m2_changes(config: Any) -> list[Any]:
    return [*plain(config), *experts(), correction(".mlp.e_score_correction_bias")]


def _glm4moe_changes(config: Any) -> list[Any]:
    return [
        beyond(config),
        *DENSE_DECODER_RENAMINGS,
        *NORMS,
        NORM_AFTER_ATTENTION,
        *experts(),
        *shared_experts(".mlp.shared_experts"),
        correction(".mlp.gate.e_score_correction_bias"),
    ]


def _deepseek2_changes(config: Any) -> list[Any]:
    return [
        beyond(config),
        *plain(config),
        *experts(),
        *shared_experts(".mlp.shared_experts"),
        correction(".mlp.gate.e_score_correction_bias"),
        WeightRenaming(r"\.attn_q_a\.", ".self_attn.q_a_proj."),
        WeightRenaming(r"\.attn_q_a_norm\.", ".self_attn.q_a_layernorm."),
        WeightRenaming(r"\.attn_q_b\.", ".self_attn.q_b_proj."),
        WeightRenaming(r"\.attn_kv_a_mqa\.", ".self_attn.kv_a_proj_with_mqa."),
        WeightRenaming(r"\.attn_kv_a_norm\.", ".self_attn.kv_a_layernorm."),
        WeightRenaming(r"\.attn_kv_b\.", ".self_attn.kv_b_proj."),
        WeightConverter([r"\.attn_k_b\.weight", r"\.attn_v_b\.weight"], ".self_attn.kv_b_proj.weight", [JoinLatents()]),
    ]


def _gemma4_changes(_config: Any) -> list[Any]:
    """Unlike in earlier ones of the family, norms are stored as they are."""
    return [
        WeightRenaming(r"^per_layer_token_embd\.", "model.embed_tokens_per_layer."),
        WeightRenaming(r"^per_layer_model_proj\.", "model.per_layer_model_projection."),
        WeightRenaming(r"^per_layer_proj_norm\.", "model.per_layer_projection_norm."),
        WeightRenaming(r"\.inp_gate\.", ".per_layer_input_gate."),
        WeightRenaming(r"\.proj\.", ".per_layer_projection."),
        WeightRenaming(r"\.post_norm\.", ".post_per_layer_input_norm."),
        WeightRenaming(r"\.layer_output_scale\.weight", ".layer_scalar"),
        WeightRenaming(r"\.pre_ffw_norm_2\.", ".pre_feedforward_layernorm_2."),
        WeightRenaming(r"\.post_ffw_norm_(1|2)\.", r".post_feedforward_layernorm_\1."),
        *DENSE_DECODER_RENAMINGS,
        *FOUR_NORMS,
        WeightRenaming(r"\.ffn_gate_inp\.scale", ".router.scale"),
        WeightRenaming(r"\.ffn_down_exps\.scale", ".router.per_expert_scale"),
        *experts(".experts", ".router.proj."),
    ]


MIXTURES = {
    "llama": Architecture("llama", _llama, _llama_changes),
    "qwen2moe": Architecture("qwen2_moe", _qwen2moe, _qwen2moe_changes),
    "qwen3moe": Architecture("qwen3_moe", _qwen3moe, _qwen3moe_changes),
    "gpt-oss": Architecture("gpt_oss", _gpt_oss, _gpt_oss_changes),
    "granitemoe": Architecture("granitemoe", _granitemoe, _granitemoe_changes),
    "minimax-m2": Architecture("minimax_m2", _minimax_m2, _minimax_m2_changes),
    "glm4moe": Architecture("glm4_moe", _glm4moe, _glm4moe_changes),
    "deepseek2": Architecture("deepseek_v3", _deepseek2, _deepseek2_changes),
    "gemma4": Architecture("gemma4_text", gemma4, _gemma4_changes),
}

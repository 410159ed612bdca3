"""What all decoders have in common, and the dense ones: configuration and changes of tensors of each architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.integrations.gguf.gguf_conversion_mapping import (
    DENSE_DECODER_RENAMINGS,
    SubtractOne,
)

from engine.gguf.fields import Fields
from engine.gguf.header import Unreadable
from engine.gguf.operations import GroupHeads, TurnedHeads
from engine.gguf.rotation import proportional, rotation

Found = dict[str, Any]


class Architecture(NamedTuple):
    """``describe`` makes the fields of a configuration, ``changes`` what is done to the tensors for it.

    Where files of one architecture are of several types of transformers, ``describe`` says ``model_type`` as well.
    """

    model_type: str
    describe: Callable[[Fields], Found]
    changes: Callable[[Any], list[Any]]


def decoder(fields: Fields, *, layerwise: bool = False) -> Found:
    """What all decoders have. ``layerwise``: layers may differ in size; told is the largest."""
    heads, hidden = fields.count("attention.head_count"), fields.count("embedding_length")
    if not heads or "token_embd.weight" not in fields.header.tensors:
        raise Unreadable("its header describes no decoder: there are no attention heads, or no token_embd.weight")
    layers = fields.layers()
    size = fields.count("attention.key_length", hidden // heads)

    def one(key: str, *default: Any) -> Any:
        return max(fields.counts(key, layers)) if layerwise and key in fields else fields.count(key, *default)

    return {
        "vocab_size": fields.header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": one("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": one("attention.head_count_kv", heads),
        "head_dim": size,
        "max_position_embeddings": fields.count("context_length"),
        "rms_norm_eps": fields.real("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_parameters": rotation(fields, size or 0),
        # llama.cpp writes the output matrix only where it is not the embedding again.
        "tie_word_embeddings": "output.weight" not in fields.header.tensors,
        **{f"{kind}_token_id": fields.token_id(key) for kind, key in _SPECIAL.items()},
    }


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}


def has(fields: Fields, name: str) -> bool:
    """Whether the first layer has a tensor."""
    return f"blk.0.{name}" in fields.header.tensors


def without(found: Found, *names: str) -> Found:
    return {name: value for name, value in found.items() if name not in names}


def layer_norm(fields: Fields) -> Any:
    """The epsilon of norms that take the mean away too."""
    return fields.real("attention.layer_norm_epsilon", 1e-5)


def windows(fields: Fields, every: int, *, last_is_full: bool = True) -> Found:
    """Layers that see a window, but for each ``every``-th one."""
    full = every - 1 if last_is_full else 0
    kinds = ["full_attention" if place % every == full else "sliding_attention" for place in range(fields.layers())]
    return {"sliding_window": fields.count("attention.sliding_window"), "layer_types": kinds}


def told_windows(fields: Fields) -> Found:
    """Layers that see a window, as the header says of each one."""
    flags = fields.flags("attention.sliding_window_pattern", fields.layers())
    kinds = ["sliding_attention" if flag else "full_attention" for flag in flags]
    return {"sliding_window": fields.count("attention.sliding_window"), "layer_types": kinds}


def llama(fields: Fields) -> Found:
    biases = {"attention_bias": has(fields, "attn_q.bias"), "mlp_bias": has(fields, "ffn_gate.bias")}
    return {**decoder(fields), **biases}


def _qwen2(fields: Fields) -> Found:
    return without(decoder(fields), "head_dim")


def _phi3(fields: Fields) -> Found:
    found = without(decoder(fields), "head_dim")
    original = fields.count("rope.scaling.original_context_length", found["max_position_embeddings"])
    window = fields.count("attention.sliding_window", 0)  # 0: none
    return {**found, "original_max_position_embeddings": original, "sliding_window": window or None}


def multipliers(fields: Fields) -> Found:
    """Of Granite. Without rotation, which some hybrids do without, it would be another model."""
    if not fields.flag("rope.scaling.finetuned", True):
        raise Unreadable("its attention rotates nothing, which a Granite model cannot do without; it is not read")
    return {
        "attention_multiplier": fields.real("attention.scale"),
        "embedding_multiplier": fields.real("embedding_scale", 1.0),
        "residual_multiplier": fields.real("residual_scale", 1.0),
        "logits_scaling": fields.real("logit_scale", 1.0),
    }


def _granite(fields: Fields) -> Found:
    return {**llama(fields), **multipliers(fields)}


def _smollm3(fields: Fields) -> Found:
    """Every fourth layer rotates nothing: published so, and not in the header."""
    rotated = [int(place % 4 != 3) for place in range(fields.layers())]
    return {**llama(fields), "no_rope_layers": rotated}


def _olmo2(fields: Fields) -> Found:
    """OLMo 2; or OLMo 3, where layers see windows: those rotate without the scaling of the others."""
    found = {**decoder(fields), "attention_bias": has(fields, "attn_q.bias")}
    if "attention.sliding_window" not in fields:
        return found
    plain = {"rope_type": "default", "rope_theta": found["rope_parameters"]["rope_theta"]}
    found["rope_parameters"] = {"full_attention": found["rope_parameters"], "sliding_attention": plain}
    return {**found, **told_windows(fields), "model_type": "olmo3"}


def _cohere2(fields: Fields) -> Found:
    found = {**without(decoder(fields), "head_dim"), **windows(fields, 4), "logit_scale": fields.real("logit_scale")}
    return {**found, "layer_norm_eps": layer_norm(fields)}


def _starcoder2(fields: Fields) -> Found:
    """The window is the published one of all StarCoder 2 models; the header has none."""
    found = {**decoder(fields), "norm_epsilon": layer_norm(fields), "use_bias": has(fields, "attn_q.bias")}
    return {**found, "sliding_window": fields.count("attention.sliding_window", 4096)}


def _mistral3(fields: Fields) -> Found:
    """Ministral 3, whose queries grow with their position; or the text part of Mistral Small 3, which is a Mistral."""
    found = decoder(fields)
    if "attention.temperature_scale" not in fields:
        return {**found, "model_type": "mistral", "sliding_window": None}
    found["rope_parameters"]["llama_4_scaling_beta"] = fields.real("attention.temperature_scale")
    found["rope_parameters"]["max_position_embeddings"] = found["max_position_embeddings"]
    return found


def _falcon(fields: Fields) -> Found:
    """Falcon 7B, with one key for all queries; or 40B and 180B, with one for each group and, mostly, two norms."""
    found = without(decoder(fields), "head_dim", "intermediate_size", "rms_norm_eps", "num_key_value_heads")
    groups = fields.count("attention.head_count_kv", 1)
    two_norms = has(fields, "attn_norm_2.weight")
    if groups > 1 and not two_norms and "rope.freq_base" not in fields:
        found["rope_parameters"]["rope_theta"] = 500042.0  # as published of Falcon 2, which the header does not say
    return {
        **found,
        "num_kv_heads": groups,
        "new_decoder_architecture": groups > 1,
        "multi_query": groups == 1,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "ffn_hidden_size": fields.count("feed_forward_length"),
        "layer_norm_epsilon": layer_norm(fields),
    }


def _nemotron(fields: Fields) -> Found:
    found = without(decoder(fields), "rms_norm_eps")
    biases = {"attention_bias": has(fields, "attn_q.bias"), "mlp_bias": has(fields, "ffn_up.bias")}
    return {**found, **biases, "norm_eps": layer_norm(fields)}


def _gemma(fields: Fields) -> Found:
    found = decoder(fields)
    return {**found, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": found["head_dim"]}


def _gemma2(fields: Fields) -> Found:
    found = {**_gemma(fields), **windows(fields, 2)}
    if found["num_hidden_layers"] == 46:  # 27B: the header does not say it
        found["query_pre_attn_scalar"] = found["hidden_size"] // found["num_attention_heads"]
    return {
        **found,
        "attn_logit_softcapping": fields.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": fields.real("final_logit_softcapping", 30.0),
    }


def _gemma3(fields: Fields) -> Found:
    found = {**_gemma(fields), **windows(fields, 6)}
    if found["num_hidden_layers"] == 62:  # 27B: the header does not say it
        found["query_pre_attn_scalar"] = found["hidden_size"] // found["num_attention_heads"]
    local = {"rope_type": "default", "rope_theta": fields.real("rope.freq_base_swa", 10000.0)}
    found["rope_parameters"] = {"full_attention": found["rope_parameters"], "sliding_attention": local}
    return {**found, "final_logit_softcapping": fields.real("final_logit_softcapping", None)}


def gemma4(fields: Fields) -> Found:
    """Layers of two sizes of heads; the last ones may share the keys of earlier ones, and have wider maps."""
    layers = fields.layers()
    found = {**decoder(fields, layerwise=True), **told_windows(fields)}
    kinds = found["layer_types"]
    wide = fields.counts("feed_forward_length", layers)
    heads = dict(zip(kinds, fields.counts("attention.head_count_kv", layers), strict=True))
    first_full = kinds.index("full_attention") if "full_attention" in kinds else 0
    local, size = fields.count("attention.key_length_swa"), fields.count("attention.key_length")
    if fields.count("rope.dimension_count_swa", local) != local:
        raise Unreadable("its layers with a window rotate a part of their heads, which Gemma 4 of transformers cannot")
    values = "per_layer_token_embd.weight"
    per_layer = fields.header.tensors[values].shape[0] if values in fields.header.tensors else found["vocab_size"]
    return {
        **found,
        "head_dim": local,
        "global_head_dim": size,
        "intermediate_size": wide[0],
        "use_double_wide_mlp": wide[-1] != wide[0],
        "num_key_value_heads": heads.get("sliding_attention", heads.get("full_attention")),
        "num_global_key_value_heads": heads.get("full_attention"),
        # Where the full layers have no map for values, keys are values too.
        "attention_k_eq_v": f"blk.{first_full}.attn_v.weight" not in fields.header.tensors,
        "num_kv_shared_layers": fields.count("attention.shared_kv_layers", 0),
        "hidden_size_per_layer_input": fields.count("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": per_layer,
        "final_logit_softcapping": fields.real("final_logit_softcapping", None),
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {
            "full_attention": proportional(fields, size),
            "sliding_attention": {"rope_type": "default", "rope_theta": fields.real("rope.freq_base_swa", 10000.0)},
        },
        "enable_moe_block": bool(fields.count("expert_count", 0)),
        "num_experts": fields.count("expert_count", 0) or None,
        "top_k_experts": fields.count("expert_used_count", 0) or None,
        "moe_intermediate_size": fields.count("expert_feed_forward_length", 0) or None,
    }


NORMS = [
    WeightRenaming(r"^output_norm\.", "model.norm."),
    WeightRenaming(r"\.attn_norm\.", ".input_layernorm."),
    WeightRenaming(r"\.attn_q_norm\.", ".self_attn.q_norm."),
    WeightRenaming(r"\.attn_k_norm\.", ".self_attn.k_norm."),
]
NORM_BEFORE_MLP = WeightRenaming(r"\.ffn_norm\.", ".post_attention_layernorm.")
NORM_AFTER_ATTENTION = WeightRenaming(r"\.post_attention_norm\.", ".post_attention_layernorm.")
NORM_AFTER_MLP = WeightRenaming(r"\.post_ffw_norm\.", ".post_feedforward_layernorm.")
FOUR_NORMS = [
    *NORMS,
    WeightRenaming(r"\.ffn_norm\.", ".pre_feedforward_layernorm."),
    NORM_AFTER_ATTENTION,
    NORM_AFTER_MLP,
]


def plain(_config: Any) -> list[Any]:
    return [*DENSE_DECODER_RENAMINGS, *NORMS, NORM_BEFORE_MLP]


def interleaved(config: Any) -> list[Any]:
    """As ``plain``, with queries and keys in the order of llama.cpp's rotation of neighbours."""
    changes = plain(config)
    for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        for kind in ("weight", "bias"):
            name = f".self_attn.{part}_proj.{kind}"
            changes.append(WeightConverter(name, name, [TurnedHeads(heads)]))
    return changes


def _phi3_changes(config: Any) -> list[Any]:
    return [
        WeightRenaming(r"\.attn_qkv\.", ".self_attn.qkv_proj."),
        WeightRenaming(r"\.ffn_up\.", ".mlp.gate_up_proj."),
        *plain(config),
    ]


def _olmo2_changes(_config: Any) -> list[Any]:
    return [*DENSE_DECODER_RENAMINGS, *NORMS, NORM_AFTER_ATTENTION, NORM_AFTER_MLP]


def _starcoder2_changes(config: Any) -> list[Any]:
    own = [WeightRenaming(r"\.ffn_up\.", ".mlp.c_fc."), WeightRenaming(r"\.ffn_down\.", ".mlp.c_proj.")]
    return [*own, *plain(config)]


def _nemotron_changes(config: Any) -> list[Any]:
    """Weights of norms are stored with one added; their biases are not."""
    return [*plain(config), WeightConverter(r"norm\.weight", "norm.weight", [SubtractOne()])]


def _falcon_changes(config: Any) -> list[Any]:
    """With two norms, the first of the file is the second of the model."""
    two = config.new_decoder_architecture and config.num_ln_in_parallel_attn == 2
    qkv = ".self_attention.query_key_value.weight"
    return [
        WeightRenaming(r"^token_embd\.", "transformer.word_embeddings."),
        WeightRenaming(r"^output_norm\.", "transformer.ln_f."),
        WeightRenaming(r"^output\.", "lm_head."),
        WeightRenaming(r"^blk\.", "transformer.h."),
        WeightRenaming(r"\.attn_norm_2\.", ".ln_attn."),
        WeightRenaming(r"\.attn_norm\.", ".ln_mlp." if two else ".input_layernorm."),
        WeightRenaming(r"\.attn_qkv\.", ".self_attention.query_key_value."),
        WeightRenaming(r"\.attn_output\.", ".self_attention.dense."),
        WeightRenaming(r"\.ffn_up\.", ".mlp.dense_h_to_4h."),
        WeightRenaming(r"\.ffn_down\.", ".mlp.dense_4h_to_h."),
        WeightConverter(qkv, qkv, [GroupHeads(config.num_attention_heads, config.num_kv_heads)]),
    ]


def _gemma_changes(_config: Any) -> list[Any]:
    """Norms are stored with one added, and there are four in a layer."""
    return [*DENSE_DECODER_RENAMINGS, *FOUR_NORMS, WeightConverter(r"norm\.weight", "norm.weight", [SubtractOne()])]


DENSE = {
    "qwen2": Architecture("qwen2", _qwen2, plain),
    "qwen3": Architecture("qwen3", decoder, plain),
    # Without images its three axes of positions are one, and what is added to its first layers is nothing: a Qwen 3.
    "qwen3vl": Architecture("qwen3", decoder, plain),
    "phi3": Architecture("phi3", _phi3, _phi3_changes),
    "granite": Architecture("granite", _granite, interleaved),
    "smollm3": Architecture("smollm3", _smollm3, interleaved),
    "olmo2": Architecture("olmo2", _olmo2, _olmo2_changes),
    "cohere2": Architecture("cohere2", _cohere2, plain),
    "starcoder2": Architecture("starcoder2", _starcoder2, _starcoder2_changes),
    "mistral3": Architecture("ministral3", _mistral3, interleaved),
    "falcon": Architecture("falcon", _falcon, _falcon_changes),
    "nemotron": Architecture("nemotron", _nemotron, _nemotron_changes),
    "gemma2": Architecture("gemma2", _gemma2, _gemma_changes),
    "gemma3": Architecture("gemma3_text", _gemma3, _gemma_changes),
}

"""Small configurations of transformers' classes: the class's own defaults, which mirror a published checkpoint, with
smaller sizes and counts.

What is not a size stays as it is: shared experts, partial rotation, interleaved layers, norms, caps. Relations stay:
grouped heads stay grouped, every kind of layer that occurs still occurs, windows are shorter than the texts of tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

VOCAB_SIZE = 320
FIRST_SPECIAL = 256
"""Ids of special tokens lie from here on: texts of tests are made of lower ones."""
HIDDEN = 64
MAX_LAYERS = 6

_Config = dict[str, Any]

LAYER_COUNTS = re.compile(
    r"^(num_hidden_layers|conf_num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|depth"
    r"|layers|num_layers_per_stack|num_lstm_layers|num_global_layers|resampler_depth|num_blocks)$"
)
LAYER_NUMBERS = re.compile(r"(layers|layer_ids|idxs|indices|indexes)$")
"""Lists of the numbers of layers, beside lists with one entry for each layer."""

_Rule = Callable[[Any, _Config], Any]
"""What a number becomes, given the configuration that holds it."""


SECTIONS = {
    (8, 12, 12): ("glm4v_text", "glm4v_moe_text", "glm_ocr_text"),
    (11, 11, 10): ("qwen3_5_text", "qwen3_5_moe_text"),
    (16, 24, 24): ("paddleocr_vl_text", "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text"),
    (24, 20, 20): ("cosmos3_edge_text", "qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_omni_moe_text"),
}
"""The axes of rotations (M-RoPE) of published checkpoints, by the type of the configuration."""

COMPLETED: dict[str, _Config] = {
    **{
        model_type: {"rope_parameters": {"mrope_section": list(section)}}
        for section, types in SECTIONS.items()
        for model_type in types
    },
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e4}}},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 5e5}},
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", *["sparse"] * 11],
        "num_hidden_layers": 12,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
    },
    "dots1": {
        "n_routed_experts": 128,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
    },
    "emu3": {"vocabulary_map": {"<image>": 151851, "<|extra_200|>": 151847}},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [22, 22, 20]}
    },
    "granite4_vision": {"deepstack_layer_map": [[-2, 0], [-1, 1]], "downsample_rate": "4/8"},
    "granitemoehybrid": {
        "layer_types": [*["linear_attention"] * 5, "full_attention", *["linear_attention"] * 4] * 4,
        "num_hidden_layers": 40,
    },
    "hunyuan_v1_dense": {"head_dim": 128, "num_key_value_heads": 8},
    "hunyuan_v1_moe": {"head_dim": 128, "num_key_value_heads": 8},
    "hunyuan_vl_text": {
        "head_dim": 128,
        "num_key_value_heads": 8,
        "rope_parameters": {"mrope_section": [16, 16, 16, 16]},
    },
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "diffusion_gemma_text": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "step3p5": {"sliding_window": 512},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 32,
    },
}
"""What published checkpoints say and the defaults of a class do not, by the type of the (sub-)configuration."""

FITTED: dict[str, _Config] = {
    "apertus1p5": {
        "image_token_offset": 260,
        "vision_config": {"codebook_size": 16},
        "audio_token_offset": 276,
        "audio_config": {"codebook_size": 16},
    },
    "dory": {"n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": HIDDEN // 4}},
    "granite4_vision": {"spatial_target_layers": [0, 1]},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
}
"""What one class asks of its small configuration beside what all do."""


def scaled_config(config_class: Any, published: _Config | None = None) -> Any:
    """The defaults of ``config_class``, small. Raises what transformers raises where it cannot be built.

    ``published`` is what a checkpoint says otherwise, in its own sizes.
    """
    default = config_class(**published or {})
    # Defaults may lack towers that every checkpoint has.
    known: _Config = {
        name: {}
        for name, kind in config_class.sub_configs.items()
        if getattr(default, name, 0) is None and issubclass(kind, PreTrainedConfig) and name not in (published or {})
    }
    small = _scaled(config_class(**known, **published or {}).to_dict(), _Special(), published or {})
    return config_class(**{key: value for key, value in small.items() if key != "model_type"})


def _merged(config: _Config, changes: _Config) -> _Config:
    inner = {
        key: _merged(config[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(config.get(key), dict)
    }
    return {**config, **changes, **inner}


class _Special:
    """Hands out ids of special tokens: equal ids stay equal, different ones different."""

    def __init__(self) -> None:
        self._given: dict[int, int] = {}

    def __call__(self, token: Any) -> Any:
        if isinstance(token, list | tuple):
            return [self(one) for one in token]
        if not isinstance(token, int) or token < 3:  # the usual ids of padding, begin and end
            return token
        return self._given.setdefault(token, VOCAB_SIZE - 1 - len(self._given))


def _scaled(config: _Config, special: _Special, published: _Config) -> _Config:
    model_type = config.get("model_type", "")
    completed = {key: value for key, value in COMPLETED.get(model_type, {}).items() if key not in published}
    config = _merged(config, completed)
    kept = _kept_layers(config)
    small = {
        key: _scaled_value(key, value, config, kept, special, published.get(key))
        for key, value in config.items()
        if key not in ("transformers_version", "id2label", "label2id")
    }
    return _merged(small, FITTED.get(model_type, {}))


def _scaled_value(
    key: str, value: Any, config: _Config, kept: list[int], special: _Special, published: Any = None
) -> Any:
    if key == "per_layer_config" and value:
        overrides = {int(layer): override for layer, override in value.items()}
        return {
            place: {name: _scaled_number(name, one, config, special) for name, one in overrides[layer].items()}
            for place, layer in enumerate(kept)
            if layer in overrides
        }
    if key == "vocabulary_map":
        return {name: special(token) for name, token in value.items()}
    if isinstance(value, dict):
        if "mrope_section" in value:
            value = {**value, "mrope_section": _sections(value, config)}
        inner = published if isinstance(published, dict) else {}
        return _scaled(value, special, inner) if "model_type" in value or key.endswith("_config") else value
    if key == "num_kv_shared_layers" and value:
        return sum(layer >= _num_layers(config) - value for layer in kept)
    if LAYER_COUNTS.match(key) and isinstance(value, int):
        return len(kept) if value == _num_layers(config) else min(value, 2)
    if isinstance(value, list | tuple) and value:
        if len(value) == _num_layers(config):
            ordered = {layer: place for place, layer in enumerate(kept)}
            if list(value) == list(range(len(value))):
                return [ordered[layer] for layer in kept]
            return [_scaled_number(key, value[layer], config, special) for layer in kept]
        if LAYER_NUMBERS.search(key) and all(isinstance(one, int) for one in value):
            return [place for place, layer in enumerate(kept) if layer in value]
        if all(isinstance(one, int) for one in value):
            return [_scaled_number(key, one, config, special) for one in value]
    return _scaled_number(key, value, config, special)


def _scaled_number(key: str, value: Any, config: _Config, special: _Special) -> Any:
    if re.search(r"(token_ids?|token_index|token|_id|_ids)$", key) and not re.search(r"layer|lang", key):
        return special(value)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    rule = next((rule for pattern, rule in RULES if re.search(pattern, key)), None)
    return value if rule is None else rule(value, config)


# --- Layers --------------------------------------------------------------------------------------


def _num_layers(config: _Config) -> int:
    for key, value in config.items():
        if LAYER_COUNTS.match(key) and isinstance(value, int):
            return value
    for key in ("layer_types", "layers_block_type"):
        if isinstance(config.get(key), list):
            return len(config[key])
    return 0


def _kept_layers(config: _Config) -> list[int]:
    """The layers of the default that stay: at least one of each kind, in their order."""
    count = _num_layers(config)
    marks: list[list[str]] = []
    for key, value in config.items():
        if not isinstance(value, list | tuple) or not value:
            continue
        if len(value) == count:
            if len({*map(str, value)}) < count or count < 3 or isinstance(value[0], str):
                marks.append([str(one) for one in value])
        elif LAYER_NUMBERS.search(key) and all(isinstance(one, int) for one in value):
            marks.append([str(layer in value) for layer in range(count)])
    kinds = [*zip(*marks, strict=True)] if marks else [()] * count
    shared = config.get("num_kv_shared_layers") or 0
    if shared:
        return [*_firsts(kinds[:-shared]), *(count - shared + layer for layer in _firsts(kinds[-shared:]))]
    firsts = _firsts(kinds)
    if not firsts or len(firsts) > MAX_LAYERS // 2:
        return firsts
    # Each kind again after all have been, so that they alternate.
    after = firsts[-1] + 1
    return [*firsts, *(after + layer for layer in _firsts(kinds[after:]))]


def _firsts(kinds: list[Any]) -> list[int]:
    return sorted(kinds.index(kind) for kind in {*kinds})


# --- Numbers -------------------------------------------------------------------------------------


def _heads(value: int, config: _Config) -> int:
    main = config.get("num_attention_heads") or value
    if isinstance(main, list):
        main = main[0]
    return min(value, 4 if value == main else 8 if value > main else 2)


def _kv_heads(value: int, config: _Config) -> int:
    """One stays one, as many as queries stay as many, and groups stay groups."""
    heads = config.get("num_attention_heads")
    return min(value, 4 if value == heads else 2)


def _head_dim(value: int, config: _Config) -> int:
    nope, rope = config.get("qk_nope_head_dim") or 0, config.get("qk_rope_head_dim") or 0
    if value == rope:
        return _rope_head_dim(value, config)
    if nope and value == nope + rope:
        return _head_dim(nope, {"qk_rope_head_dim": rope}) + _rope_head_dim(rope, {})
    if value > 256:
        return 64
    return min(value, 32 if value >= 192 else 16)


def _rope_head_dim(value: int, config: _Config) -> int:
    return min(value, 8)


def _rotary_dim(value: int, config: _Config) -> int:
    width = config.get("head_dim") or config.get("n_embd", 1) // config.get("n_head", 1) or value
    return max(2, _head_dim(width, config) * value // width)


def _sections(rope: _Config, config: _Config) -> list[int]:
    """Sections of a rotation in the same proportion, that fill the smaller head."""
    sections = rope["mrope_section"]
    width = config.get("head_dim")
    small = _head_dim(width, config) if width else 16
    total = int(small * (rope.get("partial_rotary_factor") or 1)) // 2
    parts = [part * total // sum(sections) for part in sections]
    return [part + (place < total - sum(parts)) for place, part in enumerate(parts)]


def _hidden(value: int, config: _Config) -> int:
    return min(value, HIDDEN)


def _at_most(limit: int) -> _Rule:
    return lambda value, config: min(value, limit)


# The first pattern that matches the name of a number decides.
RULES: tuple[tuple[str, _Rule], ...] = (
    # Attention.
    (r"^rotary_dim$", _rotary_dim),
    (r"^qk_rope_head_dim$", _rope_head_dim),
    (r"head_dim|head_size|headdim|d_head|dim_head|kv_channels|^d_kv$", _head_dim),
    (r"(mamba_n|mamba_num|n_mamba)_heads", _at_most(8)),
    (r"^num_heads$", lambda value, config: min(value, 8 if "state_size" in config else 4)),
    (r"(kv|key_value|key|kv_n)_heads|num_query_groups", _kv_heads),
    (r"heads|n_head$|heads_per_layer", _heads),
    (r"lora_rank|lowrank|rank$", _at_most(16)),
    (r"^(sliding_window|(sliding|attention|keep)_window_size|attention_chunk_size)$", _at_most(8)),
    (r"^(floor_scale|log_scaling_n_floor|local_attention|index_topk|canvas_length)$", _at_most(8)),
    (r"^index_topk_blocks$", _at_most(2)),
    (r"^(index_block_size|index_kpool|indexer_compress_ratio)$", _at_most(4)),
    (r"^indexer_budget$", _at_most(8)),
    # Experts.
    (r"per_tok(en)?$|moe_k$|topk$|top_k$|top_k_experts", _at_most(2)),
    (r"^(n_group|num_expert_group|n_groups)$", _at_most(2)),
    (r"^topk_group$", _at_most(1)),
    (r"shared_experts?$", _at_most(2)),
    (r"experts|zero_expert_num", _at_most(8)),
    (r"moe_.*(intermediate|hidden)_size|expert.*(size|dim)|share_expert_dim", _at_most(32)),
    # Layers.
    (r"_period$|every_n_layers|_interval$|_pattern$|layer_group_size|sparse_step|_frequency$", _at_most(2)),
    (r"first_k_dense_replace|num_dense_layers|_offset$|moe_layer_start_index", _at_most(1)),
    (r"moe_layer_end_index", _at_most(3)),
    # Sizes.
    (r"^(base_channels|upsample_initial_channel)$", _at_most(32)),
    (r"^(num_filters|n_filters)$", _at_most(4)),
    (r"^upsample_groups$", _hidden),
    (r"codebook_size", _at_most(256)),
    (r"vocab|num_embeddings", _at_most(VOCAB_SIZE)),
    (r"intermediate_size|ffn|dff|d_ff|ff_dim|dim_ff|d_inner|mlp_dim|feed_forward|dense_intermediate", _at_most(96)),
    (r"hidden_size|hidden_dim|n_embd|embed_dim|embd|emb_dim|d_model|lru_width|embedding_size|embedding_dim", _hidden),
    (r"adapter_input_size|projection_dim|(in|out)(put)?_dim|text_hidden|dim$|merged_hidden|mamba_d_ssm", _hidden),
)

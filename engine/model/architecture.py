"""What transformers calls the parts of decoder models: everything that the engine knows about families by name.

Names only say where to look. Whether a part computes what its name suggests is shown by comparison at load.
"""

from __future__ import annotations

ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "hybrid"})
STATE_LAYERS = frozenset({"linear_attention", "conv", "hybrid"})
SUPPORTED_LAYERS = ATTENTION_LAYERS | STATE_LAYERS | {"moe", "mlp"}
"""Layer types of a configuration that can be served: those that attend, those that carry a state from token to token,
those that do both, and those that look at one token alone."""

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers of one module that are usually called with the same input."""

GATE_AND_UP = (("gate_proj", "up_proj"), ("gate_up_proj",))
"""Linear layers of a gated MLP: gate and up, or both in one."""

DOWN = "down_proj"
"""The last linear layer of an MLP."""

RMS_NORM = "RMSNorm"
"""The suffix of the class names of RMSNorms."""

LAYER_NORMS = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
)
"""All norms of a decoder layer: before and after its attention, before and after its MLP."""

ATTENTION, MLP = "self_attn", "mlp"
"""The two parts of a decoder layer."""

RESIDUAL_SCALE = "residual_multiplier"
"""The attribute of a decoder layer that multiplies what both parts add."""

ROTATE = "apply_rotary_pos_emb"
"""The function of a family's module that rotates queries and keys by their positions."""

QUERY_SCALE = ("attn_temperature_tuning", "floor_scale", "attn_scale", "use_rope")
"""Attributes of an attention that scales queries by their position: whether it does, the number of positions with one
scale, how strongly they grow, and whether it rotates, for only layers that do not scale."""

LATENT_EXPANSION, LATENT_WEIGHTS = "expand_kv", "kv_b_proj"
"""The method of an attention that makes keys and values of latents, and the linear layer that does so."""

# The parts of an attention like that of Llama.
ATTENTION_PARTS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
HEAD_NORMS = frozenset({"q_norm", "k_norm"})

"""The architectures of GGUF files: what configuration of transformers each one means, and where its tensors belong.

The keys are llama.cpp's (gguf-py, ``constants.py``), what its converter does to weights is undone here
(``convert_hf_to_gguf.py``). To add an architecture: a function that makes the configuration of ``Fields``, one that
names the changes of the tensors, and a row of ``ARCHITECTURES``. What the header does not say is the published value of
the models of that architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.integrations.gguf.gguf_conversion_mapping import (
    DENSE_DECODER_RENAMINGS,
    GGUF_ARCHS,
    SubtractOne,
)

from engine.gguf.fields import Fields
from engine.gguf.header import Header, Unreadable
from engine.gguf.rotation import rotation


class Architecture(NamedTuple):
    """``describe`` makes the fields of a configuration, ``changes`` what is done to the tensors for it."""

    model_type: str
    describe: Callable[[Fields], dict[str, Any]]
    changes: Callable[[Any], list[Any]]


def config_of(header: Header) -> Any:
    """The configuration of the model in a file. Raises ``Unreadable``."""
    found = _architecture(header)
    return AutoConfig.for_model(found.model_type, **found.describe(Fields(header)))


def changes_of(header: Header, config: Any) -> list[Any]:
    """What is done to the tensors of a file, as ``engine.gguf.weights`` takes it."""
    return _architecture(header).changes(config)


def _architecture(header: Header) -> Architecture:
    if header.architecture not in ARCHITECTURES:
        raise Unreadable(
            f"its architecture {header.architecture!r} is not read; known are {', '.join(sorted(ARCHITECTURES))}. Use "
            "the model's safetensors folder"
        )
    return ARCHITECTURES[header.architecture]


def decoder(fields: Fields) -> dict[str, Any]:
    """What all decoders have."""
    heads, hidden = fields.count("attention.head_count"), fields.count("embedding_length")
    if not heads or "token_embd.weight" not in fields.header.tensors:
        raise Unreadable("its header describes no decoder: there are no attention heads, or no token_embd.weight")
    size = fields.count("attention.key_length", hidden // heads)
    return {
        "vocab_size": fields.header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": fields.count("feed_forward_length"),
        "num_hidden_layers": fields.layers(),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.count("attention.head_count_kv", heads),
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


def windows(fields: Fields, every: int) -> dict[str, Any]:
    """Layers that see a window, but for each ``every``-th one."""
    layers = fields.layers()
    window = fields.count("attention.sliding_window")
    kinds = ["full_attention" if place % every == every - 1 else "sliding_attention" for place in range(layers)]
    return {"sliding_window": window, "layer_types": kinds}


def _llama(fields: Fields) -> dict[str, Any]:
    biases = {"attention_bias": has(fields, "attn_q.bias"), "mlp_bias": has(fields, "ffn_gate.bias")}
    return {**decoder(fields), **biases}


def _qwen2(fields: Fields) -> dict[str, Any]:
    found = decoder(fields)
    del found["head_dim"]
    return found


def _gemma(fields: Fields) -> dict[str, Any]:
    found = decoder(fields)
    return {**found, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": found["head_dim"]}


def _gemma2(fields: Fields) -> dict[str, Any]:
    found = {**_gemma(fields), **windows(fields, 2)}
    if found["num_hidden_layers"] == 46:  # 27B: the header does not say it
        found["query_pre_attn_scalar"] = found["hidden_size"] // found["num_attention_heads"]
    return {
        **found,
        "attn_logit_softcapping": fields.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": fields.real("final_logit_softcapping", 30.0),
    }


def _gemma3(fields: Fields) -> dict[str, Any]:
    found = {**_gemma(fields), **windows(fields, 6)}
    if found["num_hidden_layers"] == 62:  # 27B: the header does not say it
        found["query_pre_attn_scalar"] = found["hidden_size"] // found["num_attention_heads"]
    local = {"rope_type": "default", "rope_theta": fields.real("rope.freq_base_swa", 10000.0)}
    found["rope_parameters"] = {"full_attention": found["rope_parameters"], "sliding_attention": local}
    return {**found, "final_logit_softcapping": fields.real("final_logit_softcapping", None)}


NORMS = [
    WeightRenaming(r"^output_norm\.", "model.norm."),
    WeightRenaming(r"\.attn_norm\.", ".input_layernorm."),
    WeightRenaming(r"\.attn_q_norm\.", ".self_attn.q_norm."),
    WeightRenaming(r"\.attn_k_norm\.", ".self_attn.k_norm."),
]
NORM_BEFORE_MLP = WeightRenaming(r"\.ffn_norm\.", ".post_attention_layernorm.")


def _plain(_config: Any) -> list[Any]:
    return [*DENSE_DECODER_RENAMINGS, *NORMS, NORM_BEFORE_MLP]


class TurnedHeads(ConversionOps):  # type: ignore[misc]  # transformers is read without its types
    """The rows of queries or keys in transformers' order: llama.cpp has the two halves of each head interleaved."""

    supports_packed = True

    def __init__(self, heads: int) -> None:
        self._heads = heads

    def convert(self, found: dict[str, Any], *, target_patterns: list[str], **_more: Any) -> dict[str, torch.Tensor]:
        ((tensor,),) = found.values()
        turned = tensor.unflatten(0, (self._heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return {target_patterns[0]: turned.contiguous()}


def _interleaved(config: Any) -> list[Any]:
    """As ``_plain``, with queries and keys in the order of llama.cpp's rotation of neighbours."""
    changes = _plain(config)
    for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        for kind in ("weight", "bias"):
            name = f".self_attn.{part}_proj.{kind}"
            changes.append(WeightConverter(name, name, [TurnedHeads(heads)]))
    return changes


def _gemma_changes(_config: Any) -> list[Any]:
    """Norms are stored with one added, and there are four in a layer."""
    norms = [
        *NORMS,
        WeightRenaming(r"\.ffn_norm\.", ".pre_feedforward_layernorm."),
        WeightRenaming(r"\.post_attention_norm\.", ".post_attention_layernorm."),
        WeightRenaming(r"\.post_ffw_norm\.", ".post_feedforward_layernorm."),
    ]
    return [*DENSE_DECODER_RENAMINGS, *norms, WeightConverter(r"norm\.weight", "norm.weight", [SubtractOne()])]


def _of_transformers(name: str, model_type: str) -> Architecture:
    """An architecture that transformers describes itself."""

    def describe(fields: Fields) -> dict[str, Any]:
        # Its own reader leaves texts as their number.
        metadata = {
            key: len(value) if isinstance(value, list) and value and isinstance(value[0], str) else value
            for key, value in fields.header.metadata.items()
        }
        found = GGUF_CONFIG_ARCHS[name](metadata, tuple(fields.header.tensors))
        found.pop("model_type")
        return dict(found)

    return Architecture(model_type, describe, GGUF_ARCHS[name])


ARCHITECTURES = {
    "llama": Architecture("llama", _llama, _interleaved),
    "qwen2": Architecture("qwen2", _qwen2, _plain),
    "qwen3": Architecture("qwen3", decoder, _plain),
    "gemma2": Architecture("gemma2", _gemma2, _gemma_changes),
    "gemma3": Architecture("gemma3_text", _gemma3, _gemma_changes),
    "lfm2": _of_transformers("lfm2", "lfm2"),
    "qwen35": _of_transformers("qwen35", "qwen3_5_text"),
    "qwen35moe": _of_transformers("qwen35moe", "qwen3_5_moe_text"),
}

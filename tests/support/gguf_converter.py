"""Writes a model of transformers as a GGUF file, as llama.cpp's converter does.

Names are those of gguf-py's own table; what the converter does to weights and writes into the header is done here again
(llama.cpp, ``conversion/*.py``), apart from the code that undoes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

Tensors = dict[str, torch.Tensor]
Keys = dict[str, Any]
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def converted(model: Any, architecture: str, own_keys: Any, change: Any) -> tuple[Keys, Tensors]:
    """The header's keys and the tensors of a model. ``own_keys`` and ``change`` are what its architecture has."""
    config = model.config
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    told = {**common_keys(config), **own_keys(config)}
    keys = {f"{architecture}.{key}": value for key, value in told.items() if value is not None}
    layers = keys[f"{architecture}.block_count"]
    table = gguf.get_tensor_name_map(kind, layers)
    tensors: Tensors = {}
    for name, weight in _weights(model).items():
        for changed, values in change(name, weight, config):
            found = table.get_name(changed, try_suffixes=(".weight", ".bias")) or changed
            assert found.startswith(("blk.", "token_embd", "output", "rope_f", "per_layer")), f"{changed} has no place"
            assert found not in tensors
            tensors[found] = values.detach().float().contiguous()
    return keys, tensors


def _weights(model: Any) -> Tensors:
    """All weights by name; the output matrix only where it is not the embedding again."""
    found = {**dict(model.named_parameters()), **{name: each for name, each in model.named_buffers() if _kept(name)}}
    return {name: weight.detach() for name, weight in found.items()}


def _kept(buffer: str) -> bool:
    return buffer.endswith(("e_score_correction_bias", "layer_scalar"))


def common_keys(config: Any) -> Keys:
    """What the converter writes for any model (``TextModel.set_gguf_parameters``)."""
    told = config.to_dict()
    names = {
        "block_count": ("num_hidden_layers",),
        "context_length": ("max_position_embeddings",),
        "embedding_length": ("hidden_size",),
        "feed_forward_length": ("intermediate_size",),
        "attention.head_count": ("num_attention_heads",),
        "attention.head_count_kv": ("num_key_value_heads",),
        "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
        "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
        "expert_count": ("num_local_experts", "num_experts"),
        "expert_used_count": ("num_experts_per_tok", "top_k_experts"),
        "expert_group_count": ("n_group",),
        "expert_group_used_count": ("topk_group",),
        "attention.key_length": ("head_dim",),
        "attention.value_length": ("head_dim",),
    }
    found = {
        key: next((value for each in choices if (value := _told(config, told, each)) is not None), None)
        for key, choices in names.items()
    }
    keys = {key: value for key, value in found.items() if value is not None}
    return {**keys, **rotation_keys(getattr(config, "rope_parameters", None) or {})}


def _told(config: Any, told: Keys, name: str) -> Any:
    """Also of what a class computes; nothing of what differs from layer to layer."""
    if name in told or getattr(config, "is_heterogeneous", False):
        return told.get(name)
    return getattr(config, name, None)


def rotation_keys(told: Keys) -> Keys:
    """Of the rotation; where layers differ, that of those with full attention."""
    local = (told.get("sliding_attention") or {}).get("rope_theta")
    told = told.get("full_attention", told)
    keys = {"rope.freq_base": told.get("rope_theta"), "rope.freq_base_swa": local}
    if told.get("rope_type") in ("linear", "yarn"):
        keys |= {"rope.scaling.type": told["rope_type"], "rope.scaling.factor": told["factor"]}
    if told.get("rope_type") == "longrope":
        keys["rope.scaling.type"] = "longrope"
    if told.get("rope_type") == "yarn":
        keys |= {
            "rope.scaling.original_context_length": told["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": told.get("beta_fast"),
            "rope.scaling.yarn_beta_slow": told.get("beta_slow"),
            "rope.scaling.yarn_attn_factor": told.get("attention_factor"),
        }
    if sections := told.get("mrope_section"):
        keys["rope.dimension_sections"] = [*sections, 0][:4]
    return {key: value for key, value in keys.items() if value is not None}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The halves of each head row by row, for a rotation of neighbours (``LlamaModel.permute``)."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def vocabulary(size: int) -> list[str]:
    """Control tokens, then distinct printable ones: llama.cpp tells nothing of a token that is no whole character."""
    plain = [chr(code) for code in range(33, 127)]
    return [*CONTROL, *plain, *(first + second for first in plain for second in plain)][:size]


def quantised(tensors: Tensors, kinds: Keys) -> dict[str, tuple[np.ndarray, str]]:
    """The data of each tensor and its type: the first of ``kinds`` whose pattern its name holds, if it can be."""
    found = {}
    for name, weight in tensors.items():
        kind = next((kind for pattern, kind in kinds.items() if re.search(pattern, name)), "F32")
        if weight.ndim < 2 or weight.shape[-1] % 32 or in_float32(name):
            kind = "F32"
        values = weight.numpy()
        found[name] = (values if kind == "F32" else gguf.quantize(values, gguf.GGMLQuantizationType[kind]), kind)
    return found


def in_float32(name: str) -> bool:
    """Whether llama.cpp never has a tensor in blocks."""
    return re.search(r"norm|gate_inp|conv1d|ssm_[ad]|scale|rope_f", name) is not None


def unquantised(data: dict[str, tuple[np.ndarray, str]]) -> dict[str, tuple[np.ndarray, str]]:
    """The same numbers in float32."""
    return {
        name: (values if kind == "F32" else gguf.dequantize(values, gguf.GGMLQuantizationType[kind]), "F32")
        for name, (values, kind) in data.items()
    }


def write_gguf(
    path: Path,
    architecture: str,
    keys: Keys,
    data: dict[str, tuple[np.ndarray, str]],
    pre: str = "gpt-2",
    learned: tuple[list[str], list[str]] | None = None,
) -> Path:
    """Write a file with a vocabulary of as many tokens as its embedding has rows: ``learned``, tokens and merges."""
    writer = gguf.GGUFWriter(path, architecture)
    tokens, merges = learned or (vocabulary(len(data["token_embd.weight"][0])), ["a b"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(CONTROL) + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in written(keys):
        value(writer, key)
    for name, (values, kind) in data.items():
        writer.add_tensor(name, values, raw_dtype=None if kind == "F32" else gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def written(keys: Keys) -> Iterator[tuple[str, Any]]:
    """Each key, and what writes it."""
    adders = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
    for key, value in keys.items():
        name = adders[type(value)]
        yield key, lambda writer, key, name=name, value=value: getattr(writer, name)(key, value)

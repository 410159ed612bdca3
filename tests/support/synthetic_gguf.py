"""GGUF files of any size with random weights in blocks, for measurements: shapes of real models, numbers of none.

Names, shapes and header are those that llama.cpp's converter gives a model of transformers; types are chosen as its
quantiser chooses them for Q4_K_M. The tokenizer is another file's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from support.gguf_converter import Keys, converted, in_float32, written
from support.gguf_families import FAMILIES
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SHARED: Keys = {"hidden_size": 1024, "num_attention_heads": 16, "max_position_embeddings": 32768}
KINDS: dict[str, tuple[str, Keys]] = {
    # 0.96 billion numbers, 0.2 billion of them for a token.
    "moe": (
        "qwen3moe",
        {
            "num_hidden_layers": 16,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 256,
            "intermediate_size": 3072,
            "norm_topk_prob": True,
        },
    ),
    # As Qwen3.5 0.8B: three gated delta nets to one attention.
    "hybrid": (
        "qwen35",
        {
            "num_hidden_layers": 24,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "intermediate_size": 3584,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 16,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.25,
                "mrope_section": [11, 11, 10],
                "mrope_interleaved": True,
            },
        },
    ),
}
_PLACES = {"Q4_K": (0, 2), "Q6_K": (208,)}
"""Where a block has numbers in half precision: scales, and what multiplies the minima of Q4_K."""
_MINIMA = 7.5
"""Times the scale: so many that weights are zero in the middle."""


def write_synthetic(path: Path, kind: str, tokenizer: Path, **config: Any) -> Path:
    """Write a model of ``KINDS`` with the tokenizer of another file; ``config`` changes its sizes."""
    reader = gguf.GGUFReader(tokenizer)
    fields = {name: field for name, field in reader.fields.items() if name.startswith("tokenizer.")}
    vocab_size = len(fields["tokenizer.ggml.tokens"].data)
    name, own = KINDS[kind]
    family = FAMILIES[name]
    with torch.device("meta"):
        told = CONFIG_MAPPING[family.model_type](**{**SHARED, **own, **config, "vocab_size": vocab_size})
        model = AutoModelForCausalLM.from_config(told, dtype=torch.float32)
        keys, tensors = converted(model, family.architecture, family.keys, family.change)
    writer = gguf.GGUFWriter(path, family.architecture)
    for key, value in written(keys):
        value(writer, key)
    for key, field in fields.items():
        writer.add_key_value(key, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
    numbers = np.random.default_rng(1)
    for place, empty in tensors.items():
        shape = tuple(empty.shape)
        found = _type_of(place, shape, told)
        if found == "F32":
            writer.add_tensor(place, _floats(numbers, place, shape))
        else:
            writer.add_tensor(place, _blocks(numbers, found, shape), raw_dtype=gguf.GGMLQuantizationType[found])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _type_of(place: str, shape: tuple[int, ...], config: Any) -> str:
    """As ``llama_tensor_get_type`` of llama.cpp for Q4_K_M: some layers' values and last maps have more bits."""
    if len(shape) < 2 or shape[-1] % 256 or in_float32(place):
        return "F32"
    if place == "output.weight" or (place == "token_embd.weight" and config.tie_word_embeddings):
        return "Q6_K"
    if not re.search(r"attn_v\.|ffn_down", place):
        return "Q4_K"
    layer, layers = int(place.split(".")[1]), config.num_hidden_layers
    has_more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    return "Q6_K" if has_more else "Q4_K"


def _floats(numbers: np.random.Generator, place: str, shape: tuple[int, ...]) -> np.ndarray:
    """Norms of one, decays below zero, and for all else numbers that keep what they multiply about as large."""
    if place.endswith("ssm_a"):
        return -numbers.uniform(0.5, 8, shape).astype(np.float32)
    if len(shape) == 1 and place.endswith("weight"):
        return np.ones(shape, np.float32)
    return (numbers.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def _blocks(numbers: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Blocks of any digits, with one scale for all, [..., bytes of a row]."""
    columns, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    count = int(np.prod(shape)) // columns
    blocks = np.frombuffer(numbers.bytes(count * size), np.uint8).reshape(count, size).copy()
    _scale(blocks, kind, 1.0)
    spread = float(gguf.dequantize(blocks[:256], gguf.GGMLQuantizationType[kind]).std())
    _scale(blocks, kind, 1 / (spread * np.sqrt(shape[-1])))
    return blocks.reshape(*shape[:-1], -1)


def _scale(blocks: np.ndarray, kind: str, scale: float) -> None:
    for place, share in zip(_PLACES[kind], (1, _MINIMA), strict=False):
        blocks[:, place : place + 2] = np.array([scale * share], np.float16).view(np.uint8)

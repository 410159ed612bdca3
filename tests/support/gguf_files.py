"""Small GGUF files with random weights, written as llama.cpp's converters write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

CONTROL, NORMAL = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
HIDDEN, LAYERS, HEADS = 32, 2, 4


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level vocabulary (the table of GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def write_tiny_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    control: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    merges: tuple[str, ...] = ("2 0", "1 2"),
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """A llama of two layers, whatever it calls itself, with a byte-level vocabulary.

    ``metadata`` adds integers, floats and strings.
    """
    tokens = [*control, *byte_alphabet(), *(merge.replace(" ", "") for merge in merges)]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] * len(control) + [NORMAL] * (len(tokens) - len(control)))
    writer.add_token_merges(list(merges))
    writer.add_eos_token_id(len(control) - 1)
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, float: writer.add_float32}.get(type(value), writer.add_uint32)
        add(key, value)
    for name, values in {**_weights(len(tokens)), **(tensors or {})}.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _weights(vocabulary: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.standard_normal((rows, columns), dtype=np.float32) * 0.05

    weights = {"token_embd.weight": matrix(vocabulary, HIDDEN), "output_norm.weight": np.ones(HIDDEN, np.float32)}
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            weights[f"blk.{layer}.{name}.weight"] = matrix(HIDDEN, HIDDEN)
        for name in ("ffn_gate", "ffn_up"):
            weights[f"blk.{layer}.{name}.weight"] = matrix(2 * HIDDEN, HIDDEN)
        weights[f"blk.{layer}.ffn_down.weight"] = matrix(HIDDEN, 2 * HIDDEN)
        for name in ("attn_norm", "ffn_norm"):
            weights[f"blk.{layer}.{name}.weight"] = np.ones(HIDDEN, np.float32)
    return weights

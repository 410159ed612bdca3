"""The blocks beside the float32 weights stand for exactly these weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from support.tiny import tiny_model_folder

from engine.weights.gguf_blocks import read_blocks

CHECKED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")


@pytest.mark.reference
def test_every_block_of_the_builtin_model_is_kept_and_unpacks_to_its_weight(builtin_model: Path) -> None:
    blocks = read_blocks(builtin_model)
    # Seven matrices in each of 30 layers, and the embedding, which is the output head too.
    assert Counter(kind for _, kind in blocks.values()) == {"Q4_1": 7 * 30, "Q8_0": 1}
    names = [
        "model.embed_tokens.weight",
        *(f"model.layers.{layer}.{part}.weight" for layer in (0, 29) for part in CHECKED),
    ]
    with safe_open(builtin_model / "model.safetensors", "pt") as weights:
        for name in names:
            data, kind = blocks[name]
            unpacked = gguf.dequantize(data.flatten(1).numpy(), gguf.GGMLQuantizationType[kind])
            assert torch.equal(torch.from_numpy(unpacked), weights.get_tensor(name))


def test_a_folder_without_blocks_has_none(tmp_path: Path) -> None:
    assert read_blocks(tiny_model_folder(tmp_path)) == {}

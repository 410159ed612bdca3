"""Packed panels stand for exactly the weights that they were made from, in the layout that matmul.h describes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from engine.native.packing import GROUP, PANEL, Format, Panels, fits, pack_blocks, pack_floats

COLUMNS_IN_WORD = {Format.Q4: 8, Format.Q8: 4, Format.BRAIN: 2, Format.FLOAT: 1}
SCALES = {Format.Q4: 2, Format.Q8: 1, Format.BRAIN: 0, Format.FLOAT: 0}


def unpacked(panels: Panels) -> torch.Tensor:
    """The matrix [channels, columns], read word by word as the C code does."""
    per_word, scales = COLUMNS_IN_WORD[panels.format], SCALES[panels.format]
    group_bytes = scales * 2 * PANEL + GROUP // per_word * 4 * PANEL
    groups = panels.data.numpy().reshape(len(panels.data), -1, group_bytes)
    halves = np.ascontiguousarray(groups[:, :, : scales * 2 * PANEL]).view(np.float16).astype(np.float32)
    words = np.ascontiguousarray(groups[:, :, scales * 2 * PANEL :]).view(np.uint32)
    words = words.reshape(*words.shape[:2], -1, 1, PANEL)  # [panels, groups, words, columns in a word, lanes]
    place = np.arange(per_word, dtype=np.uint32)[:, None]
    if panels.format is Format.Q4:
        digits = (words >> (4 * place) & 15).astype(np.float32)
        numbers = digits * halves[:, :, None, None, :PANEL] + halves[:, :, None, None, PANEL:]
    elif panels.format is Format.Q8:
        digits = (words >> (8 * place)).astype(np.uint8).view(np.int8).astype(np.float32)
        numbers = digits * halves[:, :, None, None, :]
    elif panels.format is Format.BRAIN:
        numbers = (words >> (16 * place) << np.uint32(16)).astype(np.uint32).view(np.float32)
    else:
        numbers = words.view(np.float32)
    return torch.from_numpy(numbers.reshape(len(groups), -1, PANEL).swapaxes(1, 2).reshape(len(groups) * PANEL, -1))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_keep_their_numbers(kind: str) -> None:
    weight = np.random.default_rng(0).normal(size=(48, 96)).astype(np.float32)
    data = gguf.quantize(weight, gguf.GGMLQuantizationType[kind])
    panels = pack_blocks(torch.from_numpy(data).view(48, 3, -1), kind)
    assert torch.equal(unpacked(panels), torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind])))


def test_floats_are_bfloat16_only_where_nothing_is_lost() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    assert pack_floats(weight).format is Format.FLOAT
    assert torch.equal(unpacked(pack_floats(weight)), weight)
    short = weight.bfloat16().float()
    assert pack_floats(short).format is Format.BRAIN
    assert torch.equal(unpacked(pack_floats(short)), short)
    assert pack_floats(short).data.numel() * 2 == pack_floats(weight).data.numel()


def test_whole_panels_and_groups_fit() -> None:
    assert fits(16, 32)
    assert not fits(15, 32)
    assert not fits(16, 33)

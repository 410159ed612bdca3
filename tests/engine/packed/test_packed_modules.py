"""Layers in blocks: what asks for their weight gets the numbers, and nothing else has them made."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support.held_weight import HeldWeight
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from engine.packed import schemes
from engine.packed.modules import MakeProduct, pack
from engine.packed.schemes import BY_NAME, Blocks

NUMBERS = np.random.default_rng(3).standard_normal((64, 64), dtype=np.float32)
MATRIX = Blocks(torch.from_numpy(gguf.quantize(NUMBERS, gguf.GGMLQuantizationType.Q8_0)), BY_NAME["Q8_0"])


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were unpacked, each time."""
    found: list[int] = []
    original = schemes.Blocks.unpacked

    def counted(blocks: Blocks, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        found.append(len(blocks.data))
        return original(blocks, dtype)

    monkeypatch.setattr(schemes.Blocks, "unpacked", counted)
    return found


def packed(module: Any, make: MakeProduct = lambda _blocks, _name: None) -> Any:
    assert pack(module, "weight", HeldWeight(MATRIX), torch.float32, make)
    module.is_loading = False
    return module


def test_an_embedding_that_asks_for_its_type_unpacks_the_rows_of_its_tokens_alone(unpacked: list[int]) -> None:
    tokens = torch.tensor([[3, 9, 3]])
    embedding = packed(Gemma3TextScaledWordEmbedding(64, 64, 0, embed_scale=8.0))
    found = embedding(tokens)
    assert unpacked == [3]
    assert torch.equal(found, MATRIX.unpacked()[tokens] * 8)


def test_a_weight_is_its_numbers(unpacked: list[int]) -> None:
    weight = packed(nn.Embedding(64, 64)).weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((64, 64), torch.float32, "cpu")
    assert not unpacked
    numbers = MATRIX.unpacked()
    assert torch.equal(weight[5:7], numbers[5:7])
    assert torch.equal(torch.ones(1, 64) @ weight.T, torch.ones(1, 64) @ numbers.T)
    assert torch.equal(weight.to(torch.bfloat16), numbers.to(torch.bfloat16))
    assert torch.equal(weight.detach(), numbers)
    assert torch.equal(weight.data.float(), numbers)


class Multiplied:
    """Multiplies by a matrix."""

    dtype = torch.float32

    def __init__(self, numbers: torch.Tensor) -> None:
        self._numbers = numbers

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self._numbers.T


def test_a_linear_map_multiplies_by_its_product(unpacked: list[int]) -> None:
    numbers = MATRIX.unpacked()
    linear = packed(nn.Linear(64, 64), lambda _blocks, _name: Multiplied(numbers))
    unpacked.clear()
    rows = torch.linspace(-1, 1, 128).view(1, 2, 64)
    assert torch.equal(linear(rows)[0], rows[0] @ numbers.T + linear.bias)
    assert not unpacked

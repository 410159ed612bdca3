"""Fused gated MLPs against torch's own operators and the models' own code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from engine.fused.kernels import ACTIVATIONS
from engine.fused.mlp import FuseGatedMlps, activated
from engine.model.loader import LoadedModel
from engine.model.probe import Probe
from engine.model.rewrites import apply_rewrites

EXPECTED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


class Config:
    hidden_size, intermediate_size, mlp_bias = 24, 40, True

    def __init__(self, activation: str) -> None:
        self.hidden_act = activation


def fuse(mlp: nn.Module) -> int:
    module = nn.ModuleDict({"mlp": mlp})
    module.device = torch.device("cpu")  # type: ignore[assignment]
    return apply_rewrites(LoadedModel(module, Probe([], 0), 0, "", ()), [FuseGatedMlps()])


def test_every_activation_is_compared() -> None:
    assert EXPECTED.keys() == set(ACTIVATIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_halves_of_a_product_and_rows_of_their_own(activation: str, dtype: torch.dtype) -> None:
    for size in (40, 1030):
        gate, up = (torch.randn(1, 5, 2 * size) * 5).to(dtype).split(size, dim=-1)
        expected = EXPECTED[activation](gate) * up
        for rows in ((gate, up), (gate.contiguous(), up), (gate[0, :1], up[0, :1])):
            found = activated(*rows, activation)
            torch.testing.assert_close(found, expected if found.dim() == 3 else expected[0, :1], rtol=2e-3, atol=1e-5)
    for extreme in (-1e4, 1e4):
        row = torch.full((1, 40), extreme).to(dtype)
        torch.testing.assert_close(activated(row, torch.ones_like(row), activation), EXPECTED[activation](row))


@pytest.mark.parametrize("code", [LlamaMLP, Phi3MLP])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "gelu", "relu", "quick_gelu"])
def test_mlps_of_known_activations_are_fused(activation: str, code: Any) -> None:
    mlp = code(Config(activation))
    source = torch.randn(1, 7, 24)
    with torch.inference_mode():
        expected = mlp(source)
        assert fuse(mlp) == (activation in ("silu", "gelu_pytorch_tanh", "gelu"))
        torch.testing.assert_close(mlp(source), expected)
        assert fuse(mlp) == 0


def test_an_mlp_that_does_more_is_left_alone() -> None:
    class Scaled(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.01

    assert fuse(Scaled(Config("silu"))) == 0

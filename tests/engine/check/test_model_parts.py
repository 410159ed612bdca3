"""Which weights of a mixture of experts a token uses, and what a class takes in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from engine.check.model_parts import active_parameters, inputs_of


class Stacked(nn.Module):
    """Experts in tensors of three dimensions."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(experts, 3, 5))


def model_of(experts: nn.Module) -> nn.Module:
    return nn.ModuleDict({"mlp": nn.ModuleDict({"gate": nn.Linear(3, 8, bias=False), "experts": experts})})


@pytest.mark.parametrize("names", [("num_experts", "num_experts_per_tok"), ("n_routed_experts", "moe_topk")])
@pytest.mark.parametrize(
    "experts", [Stacked(8), nn.ModuleList(nn.Linear(3, 5, bias=False) for _ in range(8))], ids=["stacked", "listed"]
)
def test_a_token_uses_the_experts_that_it_is_routed_to(experts: nn.Module, names: tuple[str, str]) -> None:
    config = SimpleNamespace(**dict(zip(names, (8, 2), strict=True)))
    assert active_parameters(model_of(experts), config) == 3 * 8 + 2 * 3 * 5


@pytest.mark.parametrize(
    "config", [{}, {"num_experts": 8}, {"num_experts": 1, "num_experts_per_tok": 1}, {"num_experts_per_tok": 2}]
)
def test_what_is_not_known_is_not_told(config: dict[str, Any]) -> None:
    assert active_parameters(model_of(Stacked(8)), SimpleNamespace(**config)) is None


@pytest.mark.parametrize(
    ("config", "inputs"),
    [
        ({}, ("text",)),
        ({"vision_config": None}, ("text",)),
        ({"vision_config": {}}, ("text", "image")),
        ({"image_token_id": 3, "video_token_id": 4, "audio_config": {}}, ("text", "image", "audio", "video")),
    ],
)
def test_inputs_are_told_by_towers_and_tokens(config: dict[str, Any], inputs: tuple[str, ...]) -> None:
    assert inputs_of(SimpleNamespace(**config)) == inputs

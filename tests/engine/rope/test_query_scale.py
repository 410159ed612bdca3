"""Queries of Llama 4 are scaled by the positions of the step, and only if that is what the model does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.tiny import SMALL
from transformers import AutoModelForCausalLM, Llama4TextConfig
from transformers.models.llama4 import modeling_llama4

from engine.api.errors import ModelRefused
from engine.model import attention_hook
from engine.model.probe import attending_to_itself, set_attention
from engine.rope.query_scale import scale_queries


def make(**config: Any) -> Any:
    attention_hook.register()
    given = {"head_dim": 16, "num_local_experts": 1, "intermediate_size_mlp": 64, "no_rope_layers": [1, 0]}
    small = Llama4TextConfig(**{**SMALL, "num_hidden_layers": 2, **given, **config})
    return AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()


def queries(model: Any, positions: list[int]) -> list[torch.Tensor]:
    """What the attention of each layer gets for equal tokens at these positions."""
    set_attention(model, attention_hook.PAGED)
    with attending_to_itself(model) as calls, torch.inference_mode():
        ids = torch.full((1, len(positions)), 5)
        model(input_ids=ids, position_ids=torch.tensor([positions]), use_cache=False)
    return [query for query, *_ in calls]


def test_a_token_is_scaled_by_its_own_position() -> None:
    torch.manual_seed(0)
    model = make(floor_scale=10, attn_scale=0.5)
    scale_queries(model)
    _, plain = queries(model, [0, 9, 3, 8])
    _, scaled = queries(model, [0, 19, 95, 8])
    expected = [1.0, *(1 + 0.5 * math.log1p(tens) for tens in (2, 9)), 1.0]
    unscaled = plain / torch.tensor([1.0, 1 + 0.5 * math.log1p(1), 1.0, 1.0]).view(1, 1, 4, 1)
    torch.testing.assert_close(scaled, unscaled * torch.tensor(expected).view(1, 1, 4, 1))


def test_layers_that_rotate_and_models_without_a_scale_are_left_alone() -> None:
    model = make(attn_temperature_tuning=False)
    scale_queries(model)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)
    tuned = make()
    scale_queries(tuned)
    assert [bool(layer._forward_pre_hooks) for layer in tuned.model.layers] == [False, True]


def test_a_model_that_scales_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a later release might."""
    forward = modeling_llama4.Llama4TextAttention.forward

    def other(attention: Any, *given: Any, **more: Any) -> Any:
        attention.floor_scale *= 2
        try:
            return forward(attention, *given, **more)
        finally:
            attention.floor_scale /= 2

    monkeypatch.setattr(modeling_llama4.Llama4TextAttention, "forward", other)
    with pytest.raises(ModelRefused, match=r"layer model.layers.1 scales its queries .* not known"):
        scale_queries(make())

"""Which modules are taken for mixers, and what is refused."""

from __future__ import annotations

from functools import wraps
from inspect import unwrap
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.lfm2 import modeling_lfm2
from transformers.models.lfm2.configuration_lfm2 import Lfm2Config
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv, causal_conv1d_fn

from engine.api.errors import ModelRefused
from engine.recurrent import mixer_hook


class Constant:
    """Answers every convolution with one number."""

    def __init__(self, number: float) -> None:
        self.number = number

    def convolve(self, call: int, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.full_like(x, self.number)

    def recur(self, *_: Any) -> torch.Tensor:
        raise AssertionError("a short convolution has no recurrence")


class Unknown(nn.Module):
    """Keeps a state by an operator of its own."""

    def forward(self, hidden_states: torch.Tensor, cache_params: Any = None) -> torch.Tensor:
        kept: torch.Tensor = cache_params.update_recurrent_state(causal_conv1d_fn(hidden_states, hidden_states), 0)
        return kept


class Renamed(nn.Module):
    """Takes its cache by a name of its own."""

    def forward(self, hidden_states: torch.Tensor, memory: Any = None) -> torch.Tensor:
        memory.update_conv_state(hidden_states, 0)
        out: torch.Tensor = causal_conv1d_fn(hidden_states, hidden_states)
        return out


def short_convolution() -> Lfm2ShortConv:
    config = Lfm2Config(hidden_size=8, conv_L_cache=3, num_hidden_layers=1, layer_types=["conv"])
    return Lfm2ShortConv(config, 0).eval()


def test_only_modules_that_keep_a_state_are_mixers() -> None:
    model = nn.ModuleDict({"one": nn.Linear(2, 2), "two": short_convolution()})
    assert [path for path, _ in mixer_hook.mixers(model)] == ["two"]


def test_another_operator_is_refused_by_name() -> None:
    with pytest.raises(ModelRefused, match=r"layer odd \(Unknown\) keeps a state, but not by causal_conv1d_fn and one"):
        mixer_hook.mixers(nn.ModuleDict({"odd": Unknown()}))


def test_a_cache_of_another_name_is_refused_by_name() -> None:
    with pytest.raises(ModelRefused, match=r"layer odd \(Renamed\) .* by none of the names cache, cache_params"):
        mixer_hook.mixers(nn.ModuleDict({"odd": Renamed()}))


def test_models_of_one_class_do_not_share_what_is_bound() -> None:
    plain, one, two = (short_convolution() for _ in range(3))
    for module, number in ((one, 1.0), (two, 2.0)):
        module.load_state_dict(plain.state_dict())
        mixer_hook.install(module)
        mixer_hook.install(module)
        mixer_hook.bind(module, Constant(number))
    x = torch.randn(1, 4, 8)
    with torch.inference_mode():
        single, double, own = one(x), two(x), plain(x)
    assert torch.allclose(2 * single, double)
    assert not torch.allclose(single, own)


def test_what_another_package_stands_in_for_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where causal-conv1d is installed: the numbers that all is compared with are those of torch."""
    module, x = short_convolution(), torch.randn(1, 4, 8)
    with torch.inference_mode():
        expected = module(x)

    @wraps(unwrap(causal_conv1d_fn))
    def standing_in(*_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("this runs on a GPU only")

    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", standing_in)
    with torch.inference_mode():
        assert torch.equal(mixer_hook.own_forward(module)(x), expected)
        with pytest.raises(AssertionError, match="on a GPU only"):
            module(x)


def test_padding_is_refused() -> None:
    module = short_convolution()
    mixer_hook.install(module)
    mixer_hook.bind(module, Constant(0.0))
    with pytest.raises(ModelRefused, match="mask of padding"):
        module(torch.randn(1, 4, 8), attention_mask=torch.ones(1, 4))

"""Additions fused with norms against torch's own operators, and which layers are left alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paged import lively_model_folder
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from engine.api.engine import EngineConfig
from engine.fused.layers import FusedLayer, FuseLayers, add_norm
from engine.fused.ops import FusedNorm, FuseNorms
from engine.model.loader import LoadedModel, load_model
from engine.model.probe import dry_run
from engine.model.rewrites import apply_rewrites


def llama(path: Path, **config: Any) -> LoadedModel:
    folder = lively_model_folder(path, "llama", **{"num_hidden_layers": 3, **config})
    return load_model(EngineConfig(path=str(folder), device="cpu", dtype="float32"), lambda stage, done: None)


def layers_of(model: LoadedModel) -> list[Any]:
    return list(model.module.model.layers)


def fused(model: LoadedModel) -> list[bool]:
    apply_rewrites(model, [FuseNorms()])
    count = apply_rewrites(model, [FuseLayers()])
    found = [isinstance(vars(layer).get("forward"), FusedLayer) for layer in layers_of(model)]
    assert count == sum(found)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.22])
@pytest.mark.parametrize("first", [False, True])
def test_sums_and_their_norms(first: bool, scale: float, dtype: torch.dtype) -> None:
    size = 80
    originals = [Gemma2RMSNorm(size, eps=1e-5).to(dtype) for _ in range(2)]
    for norm in originals:
        nn.init.normal_(norm.weight)
    norm, delta_norm = (FusedNorm(norm, 1e-5, 1.0, False) for norm in originals)
    residual, delta = torch.randn(1, 5, size).to(dtype), torch.randn(1, 5, 2 * size).to(dtype)[..., size:]
    with torch.inference_mode():
        added = originals[1](delta) if first else delta
        expected = residual + (added if scale == 1.0 else added * scale)
        total, normed = add_norm(residual, delta, norm, delta_norm if first else None, scale)
        torch.testing.assert_close(total, expected, rtol=2e-3, atol=1e-5)
        torch.testing.assert_close(normed, originals[0](expected), rtol=4e-3, atol=1e-5)


def test_a_norm_is_computed_once_and_only_for_what_was_expected() -> None:
    norm = FusedNorm(Gemma2RMSNorm(16), 1e-6, 1.0, False)
    source, other, known = torch.randn(1, 3, 16), torch.randn(1, 3, 16), torch.zeros(1, 3, 16)
    norm.expect(source, known)
    assert norm(source) is known
    assert norm(source) is not known
    norm.expect(source, known)
    assert torch.equal(norm(other), norm(other))
    assert norm(source) is not known


def test_all_norms_but_the_first_come_with_a_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(tmp_path)
    assert fused(model) == [True] * 3
    launches: list[str] = []
    for name, module in (("norm_kernel", "ops"), ("add_norm_kernel", "layers")):
        code = sys.modules[f"engine.fused.{module}"]
        kernel = vars(code)[name]

        class Counted:
            def __init__(self, name: str, kernel: Any) -> None:
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid: Any) -> Any:
                launches.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(code, name, Counted(name, kernel))
    dry_run(model.module)
    assert launches == ["norm_kernel"] + ["add_norm_kernel"] * 6


def test_layers_that_do_more_are_left_alone(tmp_path: Path) -> None:
    class Scaled(LlamaDecoderLayer):
        def forward(self, *args: Any, **named: Any) -> torch.Tensor:
            return super().forward(*args, **named) * 1.01

    class Unmasked(LlamaDecoderLayer):
        """Passes less to its attention than it was given."""

        def forward(self, hidden_states: torch.Tensor, use_cache: bool = False, **named: Any) -> torch.Tensor:
            found: torch.Tensor = super().forward(hidden_states, use_cache=not use_cache, **named)
            return found

    model = llama(tmp_path)
    layers = layers_of(model)
    layers[0].__class__, layers[1].__class__ = Scaled, Unmasked
    assert fused(model) == [False, False, True]


def test_a_sum_that_is_changed_before_the_norm_is_normed_anew(tmp_path: Path) -> None:
    class Doubling(LlamaDecoderLayer):
        def __call__(self, hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
            result: torch.Tensor = super().__call__(hidden_states.mul_(2.0), **named)
            return result

    model = llama(tmp_path)
    layers_of(model)[1].__class__ = Doubling
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        model.module.set_attn_implementation("eager")
        expected = model.module(input_ids=ids).logits
        model.module.set_attn_implementation("castor_paged")
        assert fused(model) == [True] * 3
        model.module.set_attn_implementation("eager")
        torch.testing.assert_close(model.module(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)

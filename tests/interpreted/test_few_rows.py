"""The kernel for products with few rows against torch, and where it is put."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paged import PagedModel, lively_model_folder, plain_logits, plain_model
from torch import nn
from torch.nn import functional

from engine.api.engine import EngineConfig
from engine.fused import few_rows
from engine.fused.few_rows import ROWS, FewRowsLinear, Product, SpeedFewRows, faster_rows, few_rows_linear
from engine.fused.linear import FirstLinear, FuseLinears
from engine.model.loader import LoadedModel, load_model
from engine.model.probe import Probe
from engine.model.rewrites import apply_rewrites

# Places in a layer, and the head: query, key and value are one, gate and up are another.
FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "llama": (5, {}),
    "qwen2": (5, {"use_sliding_window": False}),
    "phi3": (5, {}),
}


def always(products: Sequence[Product]) -> frozenset[int]:
    assert len({product.weight.shape for product in products}) == 1
    return frozenset(ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_products(rows: int, biased: bool, dtype: torch.dtype) -> None:
    for outputs, inputs in ((12, 1024), (7, 100), (8, 2060), (2, 8)):
        source = torch.randn(1, rows, 2 * inputs).to(dtype)[..., :inputs]
        weight, bias = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype), torch.randn(outputs).to(dtype)
        given = bias if biased else None
        found = few_rows_linear(source, weight, given)
        torch.testing.assert_close(found, functional.linear(source, weight, given), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_the_same(family: str, tmp_path: Path) -> None:
    places, config = FAMILIES[family]
    folder = lively_model_folder(tmp_path, family, **{"num_hidden_layers": 1, **config})
    probed = load_model(EngineConfig(path=str(folder), device="cpu", dtype="float32"), lambda stage, done: None)
    counts: list[int] = []

    def change(module: Any) -> None:
        model = replace(probed, module=module)
        apply_rewrites(model, [FuseLinears()])
        counts.append(apply_rewrites(model, [SpeedFewRows(always)]))

    model = PagedModel(folder, change=change)
    assert counts == [places]
    text = [3 + (i * i) % 250 for i in range(9)]
    expected = plain_logits(plain_model(folder), text)
    (found,) = model.run([text], max_chunk=4)
    assert found
    assert all((row - expected[index]).abs().max() < 1e-4 for index, row in found.items())


def test_only_the_rows_that_win_go_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.ModuleDict({"linear": nn.Linear(8, 4), "special": nn.LayerNorm(8)})
    module.device = torch.device("cpu")  # type: ignore[assignment]
    model = LoadedModel(module, Probe([], 0), 0, "", ())
    assert apply_rewrites(model, [SpeedFewRows(lambda _: frozenset())]) == 0
    assert apply_rewrites(model, [SpeedFewRows(lambda _: frozenset({1, 4}))]) == 1
    assert isinstance(vars(module["linear"])["forward"], FewRowsLinear)
    launched: list[int] = []
    original = few_rows.few_rows_linear

    def noted(source: torch.Tensor, *given: Any) -> torch.Tensor:
        launched.append(source.shape[-2])
        return original(source, *given)

    monkeypatch.setattr(few_rows, "few_rows_linear", noted)
    with torch.inference_mode():
        for rows in (1, 2, 3, 4, 5):
            source = torch.randn(1, rows, 8)
            expected = functional.linear(source, module["linear"].weight, module["linear"].bias)
            torch.testing.assert_close(module["linear"](source), expected)
    assert launched == [1, 4]


def test_nothing_is_timed_on_a_cpu(tmp_path: Path) -> None:
    assert faster_rows([Product(torch.zeros(4, 8), None)]) == frozenset()
    folder = lively_model_folder(tmp_path, "llama", num_hidden_layers=1)
    model = load_model(EngineConfig(path=str(folder), device="cpu", dtype="float32"), lambda stage, done: None)
    apply_rewrites(model, [FuseLinears(), SpeedFewRows()])
    layers = list(model.module.modules())
    assert any(isinstance(layer, FirstLinear) for layer in layers)
    assert not any("forward" in vars(layer) for layer in layers)

"""What is replaced in a model, and what is not because it is not equal or does not run."""

from __future__ import annotations

from math import nan
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_model_folder
from torch import nn

from engine.api.engine import EngineConfig
from engine.api.errors import EngineUnavailable
from engine.closeness import ROUNDING, difference
from engine.device import cuda_health
from engine.model.loader import LoadedModel, load_model
from engine.model.rewrites import apply_rewrites


class Scaled(nn.Module):
    def __init__(self, original: nn.Module, factor: float) -> None:
        super().__init__()
        self.original = original
        self.factor = factor

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        return self.original(source) * self.factor


class Scale:
    """Replaces the MLP of each layer by itself times one of the factors."""

    name = "MLPs"
    tolerance = ROUNDING

    def __init__(self, *factors: float, error: Exception | None = None) -> None:
        self.factors = factors
        self.error = error

    def find(self, model: LoadedModel) -> list[nn.Module]:
        return list(model.module.model.layers)

    def stand_ins(self, place: nn.Module) -> list[Scaled]:
        return [Scaled(place.mlp, factor) for factor in self.factors]

    def compare(self, place: nn.Module, stand_in: Scaled) -> tuple[float, torch.dtype]:
        if self.error:
            raise self.error
        source = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            return difference(stand_in(source), place.mlp(source)), torch.float32

    def swap(self, place: nn.Module, stand_in: Scaled) -> None:
        place.mlp = stand_in


@pytest.fixture
def model(tmp_path: Path) -> LoadedModel:
    config = EngineConfig(path=str(tiny_model_folder(tmp_path)), device="cpu", dtype="float32")
    return load_model(config, lambda stage, done: None)


def mlps(model: LoadedModel) -> list[nn.Module]:
    return [layer.mlp for layer in model.module.model.layers]


def test_the_closest_stand_in_is_taken(model: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert apply_rewrites(model, [Scale(1.5, 1.0, nan, 1 + 5e-6)]) == 2
    assert [mlp.factor for mlp in mlps(model)] == [1.0, 1.0]
    assert "2 of 2 MLPs are fused" in caplog.text


@pytest.mark.parametrize("factor", [1.01, nan])
def test_what_differs_by_more_than_rounding_stays(
    factor: float, model: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    before = mlps(model)
    assert apply_rewrites(model, [Scale(factor)]) == 0
    assert mlps(model) == before
    assert "2 of the MLPs are not fused: a stand-in differs by" in caplog.text


def test_code_that_does_not_run_leaves_the_model_alone(model: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    before = mlps(model)
    broken = Scale(1.0, error=ValueError("no such architecture\nand a trace"))
    assert apply_rewrites(model, [broken, Scale(1.0)]) == 0
    assert mlps(model) == before
    assert "The MLPs are not fused: ValueError: no such architecture" in caplog.messages


def test_memory_that_runs_out_and_a_lost_device_are_raised(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        apply_rewrites(model, [Scale(1.0, error=torch.OutOfMemoryError("CUDA out of memory"))])

    def be_lost(_device: torch.device) -> None:
        raise EngineUnavailable("the device is lost")

    monkeypatch.setattr(cuda_health, "require_device", be_lost)
    with pytest.raises(EngineUnavailable):
        apply_rewrites(model, [Scale(1.0, error=RuntimeError("an illegal memory access"))])

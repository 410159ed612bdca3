"""The recipe and what its stages do; ``tests/interpreted`` and ``tests/reference`` show that its numbers are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import tiny_model_folder

from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.attention.gather import ReferenceAttention
from engine.model.loader import load_model
from engine.platforms import cuda, recipe
from engine.platforms.cpu import CpuPlatform
from engine.platforms.cuda import CudaPlatform
from engine.platforms.recipe import platform_of, start_model
from engine.runner.torch_runner import ModelRunner
from engine.scheduling.chunk_budget import CostOverDecodes, FittedCost


def run_out(*_given: Any, **_more: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def load(folder: Path) -> None:
    config = EngineConfig(path=str(tiny_model_folder(folder)), device="cpu", max_context=64, max_running=2)
    model = load_model(config, lambda stage, done: None)
    platform = CudaPlatform(torch.device("cpu"), attention=ReferenceAttention)
    start_model(lambda: model, config, (), lambda stage, done: None, platform)


def test_no_memory_to_join_weights_refuses_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "apply_rewrites", run_out)
    with pytest.raises(ModelRefused, match=r"not enough memory on cpu for joining weights: \d+ bytes are free"):
        load(tmp_path)


def test_no_memory_for_the_cache_refuses_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "KVCache", run_out)
    with pytest.raises(ModelRefused, match=r"a KV cache of \d+ bytes: \d+ bytes are free and 0 .* lower kv_memory"):
        load(tmp_path)


def test_devices_have_their_platforms() -> None:
    assert isinstance(platform_of(torch.device("cpu")), CpuPlatform)
    assert isinstance(platform_of(torch.device("cuda", 1)), CudaPlatform)
    assert type(platform_of(torch.device("cpu")).step_cost()) is CostOverDecodes
    assert type(platform_of(torch.device("cuda", 1)).step_cost()) is FittedCost


def test_the_stages_of_a_start_on_a_cpu(tmp_path: Path) -> None:
    config = EngineConfig(path=str(tiny_model_folder(tmp_path)), device="cpu", native=False)
    stages: list[str] = []
    runner = start_model(
        lambda: load_model(config, lambda stage, done: None), config, (7,), lambda stage, done: stages.append(stage)
    )
    assert stages == ["allocating cache"]
    assert runner.info.max_running == CpuPlatform.max_running
    assert 7 in runner.info.eos_ids
    assert isinstance(runner, ModelRunner)
    assert not runner.replays

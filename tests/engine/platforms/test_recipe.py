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
from engine.cache.kv_tensors import KVCache
from engine.cache.layout import KVShape
from engine.model.loader import load_model
from engine.platforms import cuda, recipe
from engine.platforms.cpu import CpuPlatform
from engine.platforms.cuda import CudaPlatform
from engine.platforms.recipe import platform_of, start_model
from engine.runner.torch_runner import ModelRunner
from engine.scheduling.chunk_budget import CostOverDecodes, FittedCost


def run_out(*_given: Any, **_more: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def load(folder: Path, max_context: int = 64, max_running: int = 2) -> None:
    model_folder = tiny_model_folder(folder, max_position_embeddings=4096)
    config = EngineConfig(path=str(model_folder), device="cpu", max_context=max_context, max_running=max_running)
    model = load_model(config, lambda stage, done: None)
    platform = CudaPlatform(torch.device("cpu"), attention=ReferenceAttention)
    start_model(lambda: model, config, (), lambda stage, done: None, platform)


def test_no_memory_to_join_weights_refuses_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "apply_rewrites", run_out)
    with pytest.raises(ModelRefused, match=r"not enough memory for joining weights: of .*GiB for this process, "):
        load(tmp_path)


def test_no_memory_for_the_cache_refuses_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "KVCache", run_out)
    with pytest.raises(ModelRefused, match=r"a KV cache of .*iB beside 0 bytes for steps: of .* lower kv_memory"):
        load(tmp_path)


def test_a_cache_that_another_server_was_quicker_to_take_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([4 << 20, 1 << 20])
    asked: list[list[int]] = []
    released: list[torch.device] = []

    def allocate(shapes: list[KVShape], num_blocks: list[int], *given: Any, **more: Any) -> KVCache:
        asked.append(num_blocks)
        if len(asked) == 1:
            run_out()
        return KVCache(shapes, num_blocks, *given, **more)

    monkeypatch.setattr(CudaPlatform, "cache_bytes", lambda platform, kv_memory, reserved: next(free))
    monkeypatch.setattr(recipe, "KVCache", allocate)
    monkeypatch.setattr(recipe, "release_idle", released.append)
    load(tmp_path, max_context=4096, max_running=64)
    assert asked[0] == [4 * blocks for blocks in asked[1]]
    assert released == [torch.device("cpu")]


def test_the_memory_of_steps_is_held_without_what_recordings_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held: list[int] = []
    taken = iter([500, 530])
    monkeypatch.setattr(CudaPlatform, "profile", lambda *_given: (ReferenceAttention, 100))
    monkeypatch.setattr(recipe, "held_bytes", lambda device: next(taken))
    monkeypatch.setattr(recipe, "hold_bytes", lambda device, num_bytes: held.append(num_bytes))
    load(tmp_path)
    assert held == [70]
    taken = iter([500, 530])
    monkeypatch.setattr(recipe, "hold_bytes", run_out)
    load(tmp_path)
    assert "The largest steps take 100 bytes and may fail: of " in caplog.text


def test_more_cache_than_the_machine_can_map_is_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, max_position_embeddings=1 << 40)
    config = EngineConfig(path=str(folder), device="cpu", native=False, max_running=1 << 20, kv_memory=1e18)
    with pytest.raises(ModelRefused, match=r"not enough memory for a KV cache of \d+.* are available; lower kv_memory"):
        start_model(lambda: load_model(config, lambda *_: None), config, (), lambda *_: None)


def test_devices_have_their_platforms() -> None:
    assert isinstance(platform_of(torch.device("cpu")), CpuPlatform)
    assert isinstance(platform_of(torch.device("cuda", 1)), CudaPlatform)


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
    assert not runner.recorded_shapes
    assert type(CpuPlatform().step_cost(runner)) is CostOverDecodes
    assert type(CudaPlatform(torch.device("cpu")).step_cost(runner)) is FittedCost

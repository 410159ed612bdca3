"""The largest steps, as far as they can be tried without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_model_folder

from engine.api.engine import EngineConfig, ModelInfo
from engine.api.errors import EngineUnavailable
from engine.attention.gather import ReferenceAttention
from engine.cache.kv_tensors import KVCache
from engine.device import cuda_health
from engine.model.loader import load_model
from engine.runner import memory_profile
from engine.runner.memory_profile import decode_step, prefill_step, profile_steps, step_bytes
from engine.runner.torch_runner import ModelRunner
from engine.scheduling.chunk_budget import MAX_CHUNK

INFO = ModelInfo("llama", 0, "float32", "cpu", 320, 512, 16, 1, 8)


@pytest.mark.parametrize("max_context", [3, 512, 5000, 100_000])
@pytest.mark.parametrize("max_running", [1, 8, 256])
def test_no_step_of_the_scheduler_is_larger(max_context: int, max_running: int) -> None:
    info = replace(INFO, max_context=max_context, max_running=max_running)
    step = prefill_step(info)
    assert len(step) == max_running
    assert all(work.samples for work in step)
    assert all(work.num_tokens <= max_context for work in step)
    prefill = sum(work.num_tokens for work in step if work.num_tokens > 1)
    assert prefill >= min(MAX_CHUNK, max_context * max_running) - 1
    assert [work.num_tokens for work in decode_step(info)] == [1] * max_running


class Broken(ReferenceAttention):
    def __init__(self, cache: KVCache, windows: Iterable[int | None]) -> None:
        raise ValueError("out of resource: shared memory\nmore")


def test_steps_run_and_broken_kernels_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = EngineConfig(path=str(tiny_model_folder(tmp_path)), device="cpu", max_running=8)
    model = load_model(config, lambda stage, done: None)
    assert step_bytes(model, INFO, config, ReferenceAttention) == 0
    assert profile_steps(model, INFO, config, Broken) == (ReferenceAttention, 0)
    assert "ValueError: out of resource: shared memory" in caplog.text
    assert "C compiler" in caplog.text


def test_what_fails_with_any_attention_is_not_said_to_be_the_kernels_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_runner: ModelRunner, _batch: object) -> None:
        raise RuntimeError("expected scalar type Half")

    monkeypatch.setattr(ModelRunner, "forward", fail)
    config = EngineConfig(path=str(tiny_model_folder(tmp_path)), device="cpu", max_running=8)
    model = load_model(config, lambda stage, done: None)
    with pytest.raises(RuntimeError, match="Half"):
        profile_steps(model, INFO, config, Broken)
    assert "Triton" not in caplog.text


def test_a_lost_device_is_not_tried_with_another_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def be_lost(_device: torch.device) -> None:
        raise EngineUnavailable("the device is lost")

    monkeypatch.setattr(cuda_health, "require_device", be_lost)
    config = EngineConfig(path=str(tiny_model_folder(tmp_path)), device="cpu", max_running=8)
    with pytest.raises(EngineUnavailable):
        profile_steps(load_model(config, lambda stage, done: None), INFO, config, Broken)


def test_sampling_with_masks_counts_once_and_recorded_decodes_for_their_own_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards: list[int] = []
    samples: list[tuple[int, int]] = []
    monkeypatch.setattr(
        ModelRunner, "forward", lambda runner, batch: forwards.append(len(batch)) or torch.zeros(8, 320)
    )

    def sample(_sampler: object, logits: torch.Tensor, _sequences: object, masks: list[bytes | None]) -> None:
        samples.append((len(logits), sum(mask is not None for mask in masks)))

    monkeypatch.setattr(memory_profile.BatchSampler, "sample", sample)
    memories = iter([memory_profile._Memory(5, 9), memory_profile._Memory(30, 1), memory_profile._Memory(700, 400)] * 2)

    def memory_of(compute: Callable[[], object], _device: torch.device) -> memory_profile._Memory:
        compute()
        return next(memories)

    monkeypatch.setattr(memory_profile, "_memory_of", memory_of)
    config = EngineConfig(path=str(tiny_model_folder(tmp_path)), device="cpu", max_running=8)
    model = load_model(config, lambda stage, done: None)
    assert step_bytes(model, INFO, config, ReferenceAttention) == 400 + 30
    assert forwards == [1, 8, 8]
    assert samples == [(8, 7)]
    assert step_bytes(model, INFO, replace(config, cuda_graphs=False), ReferenceAttention) == 400


def test_memory_that_torch_holds_already_is_not_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"memory_allocated": 100, "memory_reserved": 150}
    for name in now:
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: now[name])
        monkeypatch.setattr(torch.cuda, f"max_{name}", lambda device, name=name: now[name])
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    found = memory_profile._memory_of(
        lambda: now.update(memory_allocated=180, memory_reserved=190), torch.device("cuda", 0)
    )
    assert found == (80, 40)

"""The largest steps, as far as they can be tried without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_model_folder

from engine.api.block_groups import BlockGroup
from engine.api.engine import EngineConfig, ModelInfo
from engine.api.errors import EngineUnavailable
from engine.attention.gather import ReferenceAttention
from engine.cache.kv_tensors import KVCache
from engine.device import cuda_health
from engine.model.loader import load_model
from engine.runner import memory_profile
from engine.runner.memory_profile import (
    decode_step,
    prefill_step,
    profile_steps,
    recorded_prefill_step,
    step_bytes,
)
from engine.runner.torch_runner import ModelRunner
from engine.scheduling.chunk_budget import MAX_CHUNK
from engine.scheduling.sequence import ScheduledChunk

INFO = ModelInfo("llama", 0, "float32", "cpu", 320, 512, 16, (BlockGroup(1),), 8)


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
    def __init__(self, cache: KVCache) -> None:
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


def test_sampling_with_masks_counts_once_and_recorded_steps_for_their_own_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards: list[tuple[int, int]] = []
    samples: list[tuple[int, int]] = []

    def forward(_runner: ModelRunner, batch: list[ScheduledChunk]) -> torch.Tensor:
        forwards.append((len(batch), sum(chunk.num_tokens for chunk in batch)))
        return torch.zeros(8, 320)

    monkeypatch.setattr(ModelRunner, "forward", forward)

    def launch(
        _sampler: object, logits: torch.Tensor, _owners: object, masks: list[bytes | None], _pending: object
    ) -> None:
        samples.append((len(logits), sum(mask is not None for mask in masks)))

    monkeypatch.setattr(memory_profile.DeviceSampler, "launch", launch)
    monkeypatch.setattr(memory_profile.DeviceSampler, "finish", lambda _sampler, _launched: samples.append((0, 0)))
    monkeypatch.setattr(memory_profile, "_recorded_sampling", lambda _runner: forwards.append((0, 7)))
    # By the number of tokens: a step that is tried once before, the decodes, recorded prefill, the largest step.
    peaks = {1: (5, 9), 8: (30, 1), 512: (200, 2), 7: (1000, 3), MAX_CHUNK: (700, 400), 64: (60, 50)}

    def memory_of(compute: Callable[[], object], _device: torch.device) -> memory_profile._Memory:
        compute()
        return memory_profile._Memory(*peaks[min(forwards[-1][1], MAX_CHUNK)])

    monkeypatch.setattr(memory_profile, "_memory_of", memory_of)
    config = EngineConfig(path=str(tiny_model_folder(tmp_path)), device="cpu", max_running=8)
    model = load_model(config, lambda stage, done: None)
    assert step_bytes(model, INFO, config, ReferenceAttention) == 400 + 30 + 200 + 1000
    assert forwards == [(1, 1), (8, 8), (8, 512), (0, 7), (8, MAX_CHUNK)]
    assert samples == [(8, 7), (8, 7), (0, 0)], "two are in flight when the first is read"
    assert step_bytes(model, INFO, replace(config, cuda_graphs=False), ReferenceAttention) == 400
    assert step_bytes(model, replace(INFO, max_context=8), config, ReferenceAttention) == 50 + 30 + 1000


@pytest.mark.parametrize("max_running", [1, 8, 256, 2000])
def test_the_recorded_step_is_the_largest_with_as_many_rows_as_can_sample(max_running: int) -> None:
    info = replace(INFO, max_context=5000, max_running=max_running)
    step = recorded_prefill_step(info)
    assert sum(chunk.num_tokens for chunk in step) == 1024
    assert len(step) == min(max_running, 1024)
    assert all(chunk.samples for chunk in step)


def test_tokens_of_the_profile_differ_as_far_as_the_vocabulary_goes() -> None:
    info = replace(INFO, max_context=5000, max_running=1)
    (chunk,) = prefill_step(info)
    assert set(chunk.sequence.tokens) == set(range(info.vocab_size))


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


@pytest.mark.parametrize("context", [64, 512])
def test_the_profile_runs_the_steps_that_are_largest(context: int, tmp_path: Path) -> None:
    """All of them, with what samples them."""
    config = EngineConfig(path=str(tiny_model_folder(tmp_path)), device="cpu", max_running=3)
    info = replace(INFO, max_context=context, max_running=3)
    assert step_bytes(load_model(config, lambda stage, done: None), info, config, ReferenceAttention) == 0

"""The largest steps, as far as they can be tried without a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_model_folder

from engine.attention.reference import ReferenceAttention
from engine.kv import KVCache
from engine.model import load_model
from engine.pacing import MAX_CHUNK
from engine.trial import attention_for, decode_step, prefill_step, step_bytes, try_steps
from engine.types import EngineConfig, ModelInfo

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


def test_a_cpu_has_the_reference() -> None:
    assert attention_for(torch.device("cpu")) is ReferenceAttention


def test_steps_run_and_broken_kernels_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(ReferenceAttention):
        def __init__(self, cache: KVCache, windows: Iterable[int | None]) -> None:
            raise ValueError("out of resource: shared memory\nmore")

    config = EngineConfig(path=str(tiny_model_folder(tmp_path)), device="cpu", max_running=8)
    model = load_model(config, lambda stage, done: None)
    assert step_bytes(model, INFO, config, ReferenceAttention) == 0
    assert try_steps(model, INFO, config, Broken) == (ReferenceAttention, 0)
    assert "ValueError: out of resource: shared memory" in caplog.text

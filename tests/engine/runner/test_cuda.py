"""The runner of a GPU where memory runs out; that its numbers are right is shown in ``tests/interpreted``."""

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
from engine.runner import cuda
from engine.runner.cuda import gpu_runner


def run_out(*_given: Any, **_more: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def load(folder: Path) -> None:
    config = EngineConfig(path=str(tiny_model_folder(folder)), device="cpu", max_context=64, max_running=2)
    model = load_model(config, lambda stage, done: None)
    gpu_runner(model, config, (), lambda stage, done: None, attention=ReferenceAttention)


def test_no_memory_to_join_weights_refuses_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "fuse", run_out)
    with pytest.raises(ModelRefused, match=r"not enough memory on cpu for joining weights: \d+ bytes are free"):
        load(tmp_path)


def test_no_memory_for_the_cache_refuses_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "KVCache", run_out)
    with pytest.raises(ModelRefused, match=r"a KV cache of \d+ bytes: \d+ bytes are free and 0 .* lower kv_memory"):
        load(tmp_path)

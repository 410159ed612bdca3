"""A model larger than its device is refused before anything is loaded; devices are made to say what they have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import tiny_model_folder
from transformers import LlamaForCausalLM

from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.device import device_memory
from engine.model import loader
from engine.model.eligibility import config_of, require_weights
from engine.model.loader import load_model
from engine.model.weight_files import require_room, stored_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def check(folder: Path, dtype: torch.dtype | str, device: torch.device) -> None:
    config = config_of(folder)
    require_room(folder, config, require_weights(folder, config), dtype, device)


def weights_of(folder: Path) -> int:
    return require_weights(folder, config_of(folder))


def have(monkeypatch: pytest.MonkeyPatch, free: int, total: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(device_memory, "available_bytes", lambda: free)
    monkeypatch.setattr(device_memory, "total_bytes", lambda: total)


def test_a_model_must_fit_in_the_type_that_it_is_loaded_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model_folder(tmp_path)
    number = weights_of(folder)
    assert stored_dtype(folder) is torch.float32
    have(monkeypatch, 4 * number, 8 * number)
    check(folder, "auto", CUDA)
    check(folder, torch.float32, CUDA)
    have(monkeypatch, 4 * number - 1, 8 * number)
    check(folder, torch.bfloat16, CUDA)
    for dtype in ("auto", torch.float32):
        with pytest.raises(ModelRefused, match=rf"the {number} weights in .* in float32, which do not fit: of the "):
            check(folder, dtype, CUDA)


def test_the_advice_depends_on_what_would_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model_folder(tmp_path)
    number = weights_of(folder)
    have(monkeypatch, number, 8 * number)
    with pytest.raises(ModelRefused, match="; end what else uses cuda:0, set device to another GPU, or serve a"):
        check(folder, torch.bfloat16, CUDA)
    have(monkeypatch, number, 2 * number)
    with pytest.raises(ModelRefused, match="; serve a smaller model, or this one with device: cpu, or halve its"):
        check(folder, torch.float32, CUDA)
    have(monkeypatch, number, 2 * number - 1)
    with pytest.raises(ModelRefused, match=r"; serve a smaller model, or this one with device: cpu$"):
        check(folder, torch.float32, CUDA)


def test_a_cpu_needs_memory_for_weights_that_are_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model_folder(tmp_path)
    size = 4 * weights_of(folder)
    have(monkeypatch, 1, size)
    check(folder, torch.float32, CPU)  # the files are mapped as they are
    with pytest.raises(ModelRefused, match=r"in bfloat16, which do not fit: of .* for this process, 1 bytes are avail"):
        check(folder, torch.bfloat16, CPU)
    have(monkeypatch, 1, size - 1)
    with pytest.raises(ModelRefused, match=r"in float32, which do not fit: .*; serve a smaller model, or halve its"):
        check(folder, torch.float32, CPU)


def test_nothing_is_loaded_of_a_model_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_given: Any, **_more: Any) -> None:
        raise AssertionError("it was loaded")

    folder = tiny_model_folder(tmp_path)
    have(monkeypatch, 1, 1)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", load)
    with pytest.raises(ModelRefused, match="do not fit"):
        load_model(EngineConfig(path=str(folder), device="cpu", dtype="bfloat16"), lambda *_: None)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError()])
def test_memory_that_runs_out_amid_loading_is_named(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_given: Any, **_more: Any) -> None:
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", run_out)
    folder = tiny_model_folder(tmp_path)
    expected = rf"^there is not enough memory for the weights in {re.escape(str(folder))}: of .* free memory, or serve"
    with pytest.raises(ModelRefused, match=expected):
        load_model(EngineConfig(path=str(folder), device="cpu"), lambda *_: None)


def test_a_gpu_without_any_memory_left_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(_device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    have(monkeypatch, 0, 80 << 30)
    monkeypatch.setattr(loader, "resolve_device", lambda name: CUDA)
    monkeypatch.setattr(loader, "take_first_memory", run_out)
    expected = r"memory for anything: of the 80.0 GiB on cuda:0, 0 bytes are free, .* 80.0 GiB by other .* end"
    with pytest.raises(ModelRefused, match=expected):
        load_model(EngineConfig(path=str(tiny_model_folder(tmp_path)), device="cuda"), lambda *_: None)

"""Whole models with recurrent layers through our kernels, recorded steps included, and what is used where they fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paged import PagedModel, lively_model_folder, plain_logits, plain_model
from support.recording import record

from engine.api.engine import EngineConfig
from engine.attention.triton_paged import TritonAttention
from engine.cache.state_tensors import StateCache
from engine.model.loader import LoadedModel, load_model
from engine.platforms import cuda
from engine.platforms.cuda import advancing
from engine.recurrent import flash_chunks, triton_states
from engine.recurrent.states import RecurrentStates
from engine.recurrent.triton_states import TritonStates
from engine.runner.torch_runner import ModelRunner

TOLERANCE = 1e-4
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: lively_model_folder(tmp_path_factory.mktemp(family), family, 3.0, num_hidden_layers=2, **sizes)
        for family, sizes in FAMILIES.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mixture_of_chunks_equals_a_plain_forward(family: str, folders: dict[str, Path]) -> None:
    """Steps of decodes are those that were recorded, and padded: three sequences in one of four."""
    texts = [[3 + (i * i + shift) % 250 for i in range(length)] for shift, length in ((0, 14), (5, 4), (9, 9))]
    paged = PagedModel(folders[family], TritonAttention, states=TritonStates, max_context=64)
    runner = paged.runner
    assert isinstance(runner, ModelRunner)
    replayed: list[None] = []

    def count(compute: Callable[[], None]) -> Callable[[], None]:
        replay = record(compute)
        return lambda: replayed.append(replay())

    runner.record_steps(paged.take_scratch(), count, lambda _stage, _done: None)
    assert {(shape.tokens, shape.only_decodes) for shape in runner.recorded_shapes} == {
        (size, True) for size in (1, 2, 4, 8)
    }
    plain = plain_model(folders[family])
    for rows, text in zip(paged.run(texts, 2), texts, strict=True):
        expected = plain_logits(plain, text)
        assert rows, "nothing was compared"
        assert all((row - expected[index]).abs().max() < TOLERANCE for index, row in rows.items())
    assert len(replayed) > 2


class Forgets(TritonStates):
    def convolve(self, index: int, *given: Any) -> torch.Tensor:
        self._cache.states[index].zero_()
        return super().convolve(index, *given)


class Repeats(TritonStates):
    """Decodes advance their states twice."""

    def decode(self, index: int, *given: Any) -> None:
        super().decode(index, *given)
        super().decode(index, *given)


def cannot_run(_cache: StateCache) -> TritonStates:
    raise RuntimeError("no kernel image is available\nmore")


def loaded(folder: Path) -> tuple[LoadedModel, StateCache]:
    model = load_model(EngineConfig(path=str(folder), device="cpu", dtype="float32"), lambda _stage, _done: None)
    return model, StateCache(model.probe.states, 2, torch.device("cpu"))


@pytest.fixture(autouse=True)
def without_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not another test of this process has imported flash-linear-attention."""

    def missing() -> None:
        raise ModuleNotFoundError("No module named 'fla'")

    monkeypatch.setattr(flash_chunks, "FlashChunks", missing)


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_are_used_once_they_are_proved_equal(
    family: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model, cache = loaded(folders[family])
    assert type(advancing(model, cache)) is TritonStates
    assert "Recurrent layers are computed by our kernels" in caplog.messages
    broken = {Forgets: "computes in chunks what differs", cannot_run: "RuntimeError: no kernel image is available"}
    if family != "lfm2":
        broken[Repeats] = "computes in chunks what differs"
    for make, reason in broken.items():
        caplog.clear()
        monkeypatch.setattr(triton_states, "TritonStates", make)
        assert type(advancing(model, cache)) is RecurrentStates
        (refusal,) = (line for line in caplog.messages if "are not computed by our kernels: " in line)
        assert reason in refusal
        assert "Recurrent layers are computed by torch, slowly" in caplog.messages


def test_a_model_without_states_needs_no_proof(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, cache = loaded(lively_model_folder(tmp_path, "llama", num_hidden_layers=1))
    assert type(advancing(model, cache)) is RecurrentStates
    assert not caplog.messages


def test_no_library_for_float32_on_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """On a device it rounds products of float32 to TF32, which no proof on a CPU can see."""
    monkeypatch.setattr(flash_chunks, "FlashChunks", object)
    for dtype, ways in ((torch.bfloat16, 2), (torch.float32, 1)):
        caplog.clear()
        assert len(list(cuda._ways_to_advance(torch.device("cuda"), dtype))) == ways
        assert ("to TF32; dtype bfloat16" in caplog.text) == (dtype == torch.float32)

"""The recipe of a GPU on a CPU: the profile, the sizes, the recordings and the results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paged import lively_model_folder, make_sequence, plain_logits, plain_model
from support.recording import record
from support.tiny import LATENT

from engine.api.block_groups import BlockGroup
from engine.api.engine import EngineConfig
from engine.api.errors import EngineUnavailable, ModelRefused
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.attention.gather import ReferenceAttention
from engine.attention.triton_paged import TritonAttention
from engine.build import load_tokenizer
from engine.core.core import Core
from engine.model.loader import Progress, load_model
from engine.platforms.cuda import CudaPlatform
from engine.platforms.recipe import start_model
from engine.runner.cuda_graphs import Recorder
from engine.runner.memory_profile import Attention
from engine.runner.torch_runner import ModelRunner
from engine.sampling import BatchSampler
from engine.sampling.device import DeviceSampler
from engine.scheduling.sequence import ScheduledChunk

# What a layer computes of its heads has its own tests; each head costs an interpreted program for each token.
FEW_HEADS = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}


def silent(_stage: str, _done: float) -> None:
    pass


def config_of(folder: Path, **config: float | str) -> EngineConfig:
    # The steps that are profiled and recorded are as long as the context, and interpreted.
    given = {"max_context": 48, "max_running": 2, "kv_memory": 1e6, **config}
    return EngineConfig(path=str(folder), device="cpu", **given)  # type: ignore[arg-type]


def gpu_runner(
    config: EngineConfig,
    *,
    record: Recorder = record,
    attention: Attention = TritonAttention,
    eos_ids: tuple[int, ...] = (),
    progress: Progress = silent,
) -> ModelRunner:
    platform = CudaPlatform(torch.device("cpu"), attention=attention, record=record)
    runner = start_model(lambda: load_model(config, silent), config, eos_ids, progress, platform)
    assert isinstance(runner, ModelRunner)
    return runner


@pytest.mark.parametrize(
    ("family", "sizes", "graphs"),
    [
        ("qwen3", {"num_hidden_layers": 2}, True),
        ("qwen3", FEW_HEADS, False),
        ("deepseek_v3", LATENT, True),
        ("lfm2", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, True),
    ],
    ids=["qwen3-recorded", "qwen3", "deepseek_v3-recorded", "lfm2-recorded"],
)
def test_it_answers_as_a_plain_forward(
    family: str, sizes: dict[str, Any], graphs: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = lively_model_folder(tmp_path, family, **sizes)
    config = config_of(folder, cuda_graphs=graphs)
    stages: list[str] = []
    runner = gpu_runner(config, eos_ids=(2,), progress=lambda stage, _done: stages.append(stage))
    assert 2 in runner.info.eos_ids
    assert stages[:3] == ["joining weights", "profiling the largest step", "allocating cache"]
    assert ("recording steps" in stages) is graphs
    text = [5 + (i * i) % 200 for i in range(40)]
    assert ("Recurrent layers are computed by our kernels" in caplog.messages) is (family == "lfm2")
    sequence = make_sequence(text[:37], [2, 0, 1])
    sequence.state_slot = 1
    found = [runner.forward([ScheduledChunk(sequence, 0, 37)])[0].clone()]
    for length in (38, 39, 40):
        sequence.tokens = text[:length]
        found.append(runner.forward([ScheduledChunk(sequence, length - 1, 1)])[0].clone())
    torch.testing.assert_close(torch.stack(found), plain_logits(plain_model(folder), text)[36:], rtol=1e-4, atol=1e-4)


def test_the_block_of_the_padding_is_paid_for_and_beyond_the_pool(tmp_path: Path) -> None:
    folder = lively_model_folder(tmp_path, "llama", **FEW_HEADS)
    per_block = 2 * 16 * 16 * 4
    config = config_of(folder, kv_memory=float(4 * per_block), max_context=64)
    runner = gpu_runner(config)
    assert runner.info.groups == (BlockGroup(3),)
    assert runner.info.max_context == 48
    config = config_of(folder, kv_memory=float(per_block))
    with pytest.raises(ModelRefused, match="kv_memory"):
        gpu_runner(config)


def refuse(_compute: Callable[[], None]) -> Callable[[], None]:
    raise RuntimeError("called a synchronizing CUDA operation\nmore")


def test_a_model_that_cannot_be_recorded_is_served_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(lively_model_folder(tmp_path, "llama", **FEW_HEADS))
    runner = gpu_runner(config, record=refuse)
    assert not runner.recorded_shapes
    assert "not recorded and will be slower: called a synchronizing CUDA operation" in caplog.text
    assert len(runner.forward([ScheduledChunk(make_sequence([5, 6], [0]), 0, 2)])) == 1


def test_a_device_that_is_lost_while_it_records_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def be_lost(_runner: ModelRunner) -> None:
        raise EngineUnavailable("the device is lost")

    monkeypatch.setattr(ModelRunner, "check", be_lost)
    config = config_of(lively_model_folder(tmp_path, "llama", **FEW_HEADS))
    with pytest.raises(EngineUnavailable):
        gpu_runner(config, record=refuse)


def answers(core: Core) -> dict[str, tuple[int, ...]]:
    """What a core says to requests that come one after another, with more of them than run at once."""
    told: dict[str, tuple[int, ...]] = {}
    for number in range(5):
        penalty = 0.5 * (number == 3)
        temperature = float(number % 2)
        sampling = SamplingParams(6 + number, temperature, seed=number, frequency_penalty=penalty)
        prompt = tuple(5 + (i * i + number) % 200 for i in range(8 * number + 1))
        core.submit(Request(f"r{number}", prompt, sampling, candidates=1 + number % 2))
        for _ in range(2 if number < 4 else 200):
            for events in core.step():
                for delta in events.deltas:
                    key = f"{events.request_id}.{delta.candidate}"
                    told[key] = told.get(key, ()) + delta.token_ids
    assert not core.has_work
    core.check()
    return told


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_a_core_says_the_same_with_it(kv_dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where it is a step ahead and the tokens stay on the device, whether that is recorded or not."""
    folder = lively_model_folder(tmp_path, "llama", **FEW_HEADS)
    config = config_of(folder, max_running=3, kv_dtype=kv_dtype)
    ours = gpu_runner(config)
    plain = gpu_runner(replace(config, cuda_graphs=False), attention=ReferenceAttention)
    assert {shape.only_decodes for shape in ours.recorded_shapes} == {True, False}
    assert not plain.recorded_shapes
    sampler = CudaPlatform(torch.device("cpu"), record=record).sampler(ours, config)
    assert isinstance(sampler, DeviceSampler)
    tokenizer = load_tokenizer(folder)
    core = Core(ours, sampler, tokenizer, config, ahead=True)
    found = answers(core)
    assert len(found) == 7
    assert found == answers(Core(plain, BatchSampler(), tokenizer, config))
    assert core.stats().redrawn_tokens > 0
    eager = CudaPlatform(torch.device("cpu"), record=refuse).sampler(plain, config)
    assert found == answers(Core(plain, eager, tokenizer, config, ahead=True))
    assert "Samplings are not recorded and will be slower: called a synchronizing" in caplog.text

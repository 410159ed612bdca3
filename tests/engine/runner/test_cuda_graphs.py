"""Which steps are recorded, that replaying equals computing, and how CUDA is asked to record.

The same with our kernels is in ``tests/interpreted``.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.paged import PagedModel, lively_model_folder
from support.recording import ForbiddenError, GraphGather, record
from support.tiny import tiny_model_folder

from engine.api.block_groups import BlockGroup
from engine.api.engine import ModelInfo
from engine.runner.cuda_graphs import PREFILL_SIZES, CudaRecorder, Recorder, batch_sizes, recorded_shapes
from engine.runner.torch_runner import ModelRunner
from engine.scheduling.flat_batch import StepShape
from engine.scheduling.sequence import ScheduledChunk

HYBRID = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
RECURRENT = {
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 2,
    },
}


def test_sizes_of_the_default() -> None:
    assert batch_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert len(batch_sizes(256)) < 25


@given(max_running=st.integers(1, 1000))
def test_every_number_of_sequences_has_a_size(max_running: int) -> None:
    sizes = batch_sizes(max_running)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_running
    for running in range(1, max_running + 1):
        size = next(size for size in sizes if size >= running)
        assert size - running <= (running - 1 if running <= 16 else size / 3)


def test_every_step_with_prefill_has_a_shape_that_a_sequence_could_fill() -> None:
    info = ModelInfo("", 0, "float32", "cpu", 320, 100_000, 16, (BlockGroup(1),), 256)
    _, prefills = recorded_shapes(info)
    assert [shape.tokens for shape in prefills] == list(PREFILL_SIZES)
    assert max(PREFILL_SIZES) == 1024
    _, prefills = recorded_shapes(replace(info, max_context=300))
    assert [shape.tokens for shape in prefills] == [16, 64, 128, 256]


def silent(_stage: str, _done: float) -> None:
    pass


class Twins:
    """A model whose steps are recorded, and another that computes the same; both with the same blocks and texts."""

    def __init__(self, folder: Path, texts: list[list[int]]) -> None:
        self.models = PagedModel(folder, GraphGather), PagedModel(folder)
        self.texts = texts
        self.sequences = []
        for model in self.models:
            scratch = model.take_scratch()
            self.sequences.append([model.sequence(text, model.take_blocks(len(text))) for text in texts])
            for slot, sequence in enumerate(self.sequences[-1]):
                sequence.state_slot = slot
        self.recorded, self.plain = (model.runner for model in self.models)
        self.shapes: list[StepShape] = []
        self.recorded.record_steps(scratch, record, silent)
        forward = self.recorded.recorded.forward
        self.recorded.recorded.forward = lambda batch, shape: self.shapes.append(shape) or forward(batch, shape)

    def step(self, parts: list[tuple[int, int, int, bool]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of both for parts ``(text, start, tokens, samples)``."""
        found = []
        for model, sequences in zip(self.models, self.sequences, strict=True):
            chunks = []
            for text, start, count, samples in parts:
                sequence = sequences[text]
                sequence.tokens = self.texts[text][: start + count if samples else None]
                chunks.append(ScheduledChunk(sequence, start, count))
            found.append(model.runner.forward(chunks).clone())
        return found[0], found[1]


@pytest.mark.parametrize("seed", range(6))
def test_a_recorded_step_of_any_mixture_equals_the_computed_one(seed: int, tmp_path: Path) -> None:
    """Decodes and chunks with and without a past, any of which may sample, padded by any number of tokens."""
    family = ("llama", "gemma2", "qwen3")[seed % 3]
    rnd = random.Random(seed)
    texts = [[3 + rnd.randrange(250) for _ in range(rnd.choice((3, 30, 90, 200)))] for _ in range(8)]
    config = {"num_hidden_layers": 2, **(HYBRID if family == "gemma2" else {})}
    twins, done = Twins(lively_model_folder(tmp_path, family, **config), texts), [0] * len(texts)
    while any(count < len(text) - 1 for count, text in zip(done, texts, strict=True)):
        parts = []
        for number in rnd.sample(range(len(texts)), rnd.randint(1, len(texts))):
            left = len(texts[number]) - 1 - done[number]
            count = min(left, rnd.choice((1, 1, 2, 17, 60)))
            if count:
                parts.append((number, done[number], count, rnd.random() < 0.6))
                done[number] += count
        if parts:
            found, expected = twins.step(parts)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found, expected = twins.step([(number, count, 1, True) for number, count in enumerate(done)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len({shape for shape in twins.shapes if not shape.only_decodes}) >= 2
    assert twins.shapes[-1] == StepShape(8, only_decodes=True)


@pytest.mark.parametrize("family", RECURRENT)
def test_decodes_of_recurrent_layers_are_recorded(family: str, tmp_path: Path) -> None:
    """A chunk between them changes the states that the next recorded step continues."""
    texts = [[3 + 11 * n * i % 250 for i in range(1, 40)] for n in range(1, 8)]
    twins = Twins(lively_model_folder(tmp_path, family, **RECURRENT[family]), texts)
    assert all(shape.only_decodes for shape in twins.recorded.recorded_shapes)
    steps, done = [[(number, 0, number + 2, True) for number in range(7)]], [number + 2 for number in range(7)]
    for step in range(12):
        steps.append([])
        for number in range(step % 3, 7):
            count = 3 if (step, number) == (5, 3) else 1
            steps[-1].append((number, done[number], count, True))
            done[number] += count
    for parts in steps:
        found, expected = twins.step(parts)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-4)
    assert len(twins.shapes) == 11


def test_a_step_that_no_shape_holds_is_computed(tmp_path: Path) -> None:
    text = [3 + 7 * i % 250 for i in range(500)]
    twins = Twins(tiny_model_folder(tmp_path), [text, text[:400]])
    found, expected = twins.step([(0, 0, 200, True), (1, 0, 400, True)])
    torch.testing.assert_close(found, expected)
    assert twins.shapes == []
    found, expected = twins.step([(0, 200, 16, False)])
    assert found.shape == expected.shape == (0, 320)
    assert twins.shapes == [StepShape(16, only_decodes=False)]


def test_all_recorded_steps_leave_their_logits_at_one_place(tmp_path: Path) -> None:
    twins = Twins(tiny_model_folder(tmp_path), [[5, 6, 7, 8, 9]] * 2)
    recorded = twins.recorded.recorded
    assert recorded is not None
    place = recorded.logits.data_ptr()
    for parts in ([(0, 0, 3, True)], [(0, 3, 1, True), (1, 0, 2, True)], [(0, 4, 1, True), (1, 2, 1, True)]):
        found, _ = twins.step(parts)
        assert recorded.logits.data_ptr() == place
        assert torch.equal(recorded.logits[: len(found)], found)
    assert recorded.logits.shape == (8, 320)
    assert recorded.logits.dtype == torch.float32


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_a_token_that_only_the_device_knows_is_looked_up_there(recorded: bool, count: int, tmp_path: Path) -> None:
    """A decode beside another, and one at the end of a chunk."""
    text = [3 + 7 * i % 250 for i in range(9)]
    model = PagedModel(tiny_model_folder(tmp_path), GraphGather)
    runner = model.runner
    assert isinstance(runner, ModelRunner)
    scratch = model.take_scratch()
    first, second = (model.sequence(text, model.take_blocks(len(text))) for _ in range(2))
    runner.forward([ScheduledChunk(sequence, 0, 6) for sequence in (first, second)])
    if recorded:
        runner.record_steps(scratch, record, silent)
    chunks = [ScheduledChunk(first, 9 - count, count), ScheduledChunk(second, 6, 1)]
    expected = runner.forward(chunks).clone()
    assert runner.sampled.shape == (8,)
    assert runner.sampled.dtype == torch.long
    assert not runner.sampled.any()
    runner.sampled[5], runner.sampled[0] = text[8], text[6]
    first.tokens, second.tokens = [*text[:8], -1 - 5], [*text[:6], -1, *text[7:]]
    torch.testing.assert_close(runner.forward(chunks), expected)
    runner.sampled[5] = text[8] + 1
    assert (runner.forward(chunks)[0] - expected[0]).abs().max() > 1e-3


def refusing(refused: Callable[[int], bool]) -> Recorder:
    """A recorder that fails at those recordings, counted from 0."""
    numbers = iter(range(1000))

    def record_unless(compute: Callable[[], None]) -> Callable[[], None]:
        if refused(next(numbers)):
            raise RuntimeError("called a synchronizing CUDA operation")
        return record(compute)

    return record_unless


def test_decodes_stay_recorded_where_prefill_cannot_be_and_not_the_other_way_round(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    decodes = [StepShape(size, only_decodes=True) for size in batch_sizes(8)]
    model = PagedModel(folder, GraphGather)
    # The largest with prefill is recorded and the next one fails: then neither is replayed.
    with pytest.raises(RuntimeError, match="synchronizing"):
        model.runner.record_steps(model.take_scratch(), refusing(lambda number: number > len(decodes)), silent)
    assert sorted(model.runner.recorded_shapes) == decodes
    sequence = model.sequence([5, 6, 7], model.take_blocks(3))
    assert model.runner.forward([ScheduledChunk(sequence, 0, 3)]).shape == (1, 320)
    model, tried = PagedModel(folder, GraphGather), []
    with pytest.raises(RuntimeError, match="synchronizing"):
        model.runner.record_steps(
            model.take_scratch(), refusing(lambda number: tried.append(number) or number == 2), silent
        )
    assert tried == [0, 1, 2]
    assert model.runner.recorded_shapes == []


def test_how_long_recorded_steps_take_is_measured_on_padding_alone(tmp_path: Path) -> None:
    model = PagedModel(tiny_model_folder(tmp_path), GraphGather)
    scratch = model.take_scratch()
    assert model.runner.recorded_seconds() == {}
    model.runner.record_steps(scratch, record, silent)
    seconds = model.runner.recorded_seconds()
    assert seconds.keys() == set(model.runner.recorded_shapes)
    assert all(taken > 0 for taken in seconds.values())
    for blocks in (*model.cache.keys, *model.cache.values):
        assert {int(block) for block in (blocks != model.STALE).flatten(1).any(1).nonzero()} == {*scratch}


def test_an_attention_that_cannot_be_recorded_is_left_alone(tmp_path: Path) -> None:
    model = PagedModel(tiny_model_folder(tmp_path))
    model.runner.record_steps(model.take_scratch(), lambda compute: pytest.fail("recorded"), silent)
    assert model.runner.recorded_shapes == []


FORBIDDEN: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda numbers: numbers[0].item(),
    "tolist": lambda numbers: numbers.tolist(),
    "cpu": lambda numbers: numbers.cpu(),
    "numpy": lambda numbers: numbers.numpy(),
    "if": lambda numbers: bool(numbers[0] > 1),
    "nonzero": lambda numbers: numbers.nonzero(),
    "where": lambda numbers: torch.where(numbers > 1),
    "mask": lambda numbers: numbers[numbers > 1],
    "unique": lambda numbers: numbers.unique(),
    "equal": lambda numbers: torch.equal(numbers, numbers),
    "tensor": lambda _numbers: torch.tensor([1, 2]),
    "list": lambda numbers: numbers[[0, 1]],
    "frombuffer": lambda _numbers: torch.frombuffer(array("i", [1]), dtype=torch.int32),
    "download": lambda numbers: numbers.to("meta"),
    "upload": lambda numbers: torch.empty(5, dtype=numbers.dtype, device="meta").copy_(numbers),
}


@pytest.mark.parametrize("name", FORBIDDEN)
@pytest.mark.parametrize("inference", [True, False])
def test_the_stand_in_for_a_recorder_raises_on_what_a_capture_forbids(name: str, inference: bool) -> None:
    numbers = torch.arange(5)

    def allowed() -> None:
        numbers[numbers.clamp(max=2)].float().softmax(0).copy_(torch.zeros(5))

    def forbidden() -> None:
        allowed()
        FORBIDDEN[name](numbers)

    with torch.inference_mode(inference):
        record(allowed)()
        with pytest.raises(ForbiddenError):
            record(forbidden)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma2": HYBRID,
    "gemma3_text": HYBRID,
    "phi3": {},
    "granite": {},
    "smollm3": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_steps_of_this_family_can_be_recorded(family: str, tmp_path: Path) -> None:
    """A recording forbids to wait for the device and to bring numbers to it; on a CPU the operators for that show."""
    model = PagedModel(tiny_model_folder(tmp_path, family, **FAMILIES[family]), GraphGather)
    model.runner.record_steps(model.take_scratch(), record, silent)
    assert len(model.runner.recorded_shapes) == len(batch_sizes(8)) + 6


def test_experts_that_are_chosen_on_the_host_are_not_recorded(tmp_path: Path) -> None:
    folder = tiny_model_folder(
        tmp_path, "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
    )
    model = PagedModel(folder, GraphGather, change=lambda module: module.set_experts_implementation("eager"))
    with pytest.raises(ForbiddenError):
        model.runner.record_steps(model.take_scratch(), record, silent)
    assert model.runner.recorded_shapes == []


class FakeCuda:
    """What a recording asks of ``torch.cuda``, noting where and how computations run.

    As in torch, the stream of a recording stays current where the end of the recording fails.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = self.main = _Stream()
        self.mode: int | str = 0
        self.recording = False
        self.fails_at_end = False
        self.runs: list[tuple[_Stream, int | str, bool]] = []
        fakes = {
            "graph_pool_handle": lambda: "pool",
            "Stream": _Stream,
            "current_stream": lambda: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "stream": self.on,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
            "CUDAGraph": _Graph,
            "graph": self.graph,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def compute(self) -> None:
        self.runs.append((self.current, self.mode, self.recording))

    def compute_and_wait(self) -> None:
        self.compute()
        assert not self.recording, "a recording that waits"
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    @contextmanager
    def on(self, stream: _Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: _Graph, *, pool: str, stream: _Stream) -> Iterator[None]:
        assert pool == "pool"
        before, self.current, self.recording = self.current, stream, True
        try:
            yield
        finally:
            if self.fails_at_end:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.current, self.recording = before, False


class _Stream:
    def wait_stream(self, stream: _Stream) -> None:
        assert stream is not self


class _Graph:
    def replay(self) -> None: ...


def test_recordings_share_a_stream_and_waiting_is_looked_for_before_each(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    record = CudaRecorder()
    for _ in range(3):
        assert callable(record(cuda.compute))
    assert [(mode, recording) for _, mode, recording in cuda.runs] == [(0, False), ("error", False), (0, True)] * 3
    (stream,) = {stream for stream, _, _ in cuda.runs}
    assert stream is not cuda.main
    assert cuda.current is cuda.main


def test_what_waits_for_the_device_is_never_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    with pytest.raises(RuntimeError, match="synchronizing"):
        CudaRecorder()(cuda.compute_and_wait)
    assert len(cuda.runs) == 2
    assert cuda.mode == 0
    assert cuda.current is cuda.main


def test_a_recording_that_fails_at_its_end_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    cuda.fails_at_end = True
    with pytest.raises(RuntimeError, match="previous error"):
        CudaRecorder()(cuda.compute)
    assert cuda.current is cuda.main

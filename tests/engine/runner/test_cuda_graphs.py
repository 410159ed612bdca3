"""Which decode steps are recorded; that replaying equals computing is shown in ``tests/interpreted``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.paged import PagedModel, make_sequence
from support.tiny import tiny_model_folder
from torch.utils._python_dispatch import TorchDispatchMode

from engine.runner.cuda_graphs import CudaRecorder, batch_sizes
from engine.scheduling.flat_batch import flatten
from engine.scheduling.sequence import ScheduledChunk


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


def test_an_attention_that_cannot_be_recorded_is_left_alone(tmp_path: Path) -> None:
    model = PagedModel(tiny_model_folder(tmp_path))
    model.runner.record_decodes(0, lambda compute: pytest.fail("recorded"), lambda stage, done: None)


HYBRID = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
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


class _Operators(TorchDispatchMode):  # type: ignore[misc]
    """Notes which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_of_this_family_can_be_recorded(family: str, tmp_path: Path) -> None:
    """A recording forbids to wait for the device and to bring numbers to it; on a CPU the operators for that show."""
    model = PagedModel(tiny_model_folder(tmp_path, family, **FAMILIES[family]))
    sequence = make_sequence([5, 6], model.take_blocks(2))
    model.runner.attention.prepare(flatten([ScheduledChunk(sequence, 1, 1)], model.block_size))
    module = model.runner._model
    ids, positions = torch.tensor([[6]]), torch.tensor([[1]])
    with torch.inference_mode(), _Operators() as seen:
        module(input_ids=ids, position_ids=positions, use_cache=False)
    assert len(seen.names) > 10
    assert not seen.names & {"_local_scalar_dense", "item", "nonzero", "lift_fresh", "equal", "is_nonzero", "unique2"}


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

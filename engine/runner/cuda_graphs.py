"""Decode steps that are recorded once for each batch size and replayed: one launch per step.

What a step is (tokens, positions, slots, block tables) lies in buffers that never move. A step of fewer sequences than
were recorded is padded; what pads it lives in a block that no sequence owns. Sampling is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from engine.api.engine import ModelInfo
from engine.attention.base import GraphAttention
from engine.attention.staging import StagedNumbers
from engine.model.loader import Progress
from engine.scheduling.flat_batch import FlatBatch, StepShape, flatten

# Runs a computation once and returns what runs it again, on the same tensors.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]


def batch_sizes(max_running: int) -> list[int]:
    """The sizes that are recorded, ascending: beyond 16, padding is at most a third and usually far less.

    Few sizes, because each costs a second at load and some memory.
    """
    steps = [1, 2, 4, 8, *range(16, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, max_running, 64)]
    return [*(size for size in steps if size < max_running), max_running]


class DecodeGraphs:
    """The recorded decode steps of one model. ``scratch_block`` is the block of the padding.

    Call inside of ``torch.inference_mode``.
    """

    def __init__(
        self, module: Any, attention: GraphAttention, info: ModelInfo, scratch_block: int, record: Recorder
    ) -> None:
        self._module = module
        self._attention = attention
        self._scratch_block = scratch_block
        self._record = record
        self._block_size = info.block_size
        self._sizes = batch_sizes(info.max_running)
        device = torch.device(info.device)
        shapes = [StepShape(size, only_decodes=True) for size in self._sizes]
        attention.reserve(shapes, info.max_running, -(-info.max_context // info.block_size))
        self._inputs = StagedNumbers(2 * info.max_running, device)
        self._logits = torch.zeros(info.max_running, info.vocab_size, device=device)
        self._replays: dict[int, Callable[[], None]] = {}

    def capture(self, progress: Progress) -> None:
        """Record every size, the largest first, so that the smaller ones find its memory; takes seconds."""
        for done, size in enumerate(reversed(self._sizes)):
            progress("recording decode steps", done / len(self._sizes))
            self._fill(flatten([], self._block_size), size)
            self._replays[size] = self._record(lambda size=size: self._compute(size))  # type: ignore[misc]
        progress("recording decode steps", 1.0)

    def covers(self, batch: FlatBatch) -> bool:
        """Whether ``forward`` takes this step: decodes of text only."""
        special = (batch.position_axes, batch.embeddings, batch.key_limits)
        return batch.only_decodes and len(batch.tokens) <= self._sizes[-1] and special == (None, None, None)

    def forward(self, batch: FlatBatch) -> torch.Tensor:
        """Logits of the chunks that sample, as ``ModelRunner.forward`` returns them; valid until the next step."""
        count, rows = len(batch.tokens), batch.sample_rows
        size = next(size for size in self._sizes if size >= count)
        self._fill(batch, size)
        self._replays[size]()
        return self._logits[:count] if len(rows) == count else self._logits[rows.tolist()]

    def _fill(self, batch: FlatBatch, size: int) -> None:
        padded = batch.padded(size, self._scratch_block, self._block_size)
        self._inputs.upload(padded.tokens + padded.positions)
        self._attention.fill(padded, StepShape(size, only_decodes=True))

    def _compute(self, size: int) -> None:
        self._attention.capture(StepShape(size, only_decodes=True))
        numbers = self._inputs.numbers.long()
        output = self._module(
            input_ids=numbers[None, :size], position_ids=numbers[None, size : 2 * size], use_cache=False
        )
        self._logits[:size].copy_(output.logits[0])


class CudaRecorder:
    """``Recorder`` of CUDA graphs, which share their memory: one at a time is replayed.

    A recording that fails is not local: torch's allocator and generators may take it to be under way for ever. So what
    would wait for the device, which no recording may, is found out before. All runs are on one stream, because
    libraries keep some memory for each that they have seen.

    Raises ``RuntimeError`` where the computation cannot be recorded. Then the device may still be at work on it.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            # Once unrecorded: kernels are compiled and libraries take their memory, not to happen in a recording.
            compute()
            with _waiting_is_an_error():
                compute()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                compute()
        finally:
            torch.cuda.set_stream(current)  # torch leaves its own current where the end of the recording fails
        current.wait_stream(self._stream)
        replay: Callable[[], None] = graph.replay
        return replay


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """Have operators that wait for the device (``.item()``, ``.cpu()``, ``nonzero``) raise ``RuntimeError``."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)

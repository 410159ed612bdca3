"""Steps that are recorded once for each shape and replayed: one launch, where Python would launch kernel by kernel.

What a step is (tokens, positions, rows that sample, slots, block tables, tokens of long texts) lies in buffers that
never move. A step of fewer tokens than were recorded is padded; what pads it lives in a block that no sequence owns.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from engine.api.engine import ModelInfo
from engine.attention.base import GraphAttention
from engine.device.staging import StagedNumbers
from engine.model.loader import Progress
from engine.recurrent.states import RecurrentStates
from engine.rope.long_rope import LongRope
from engine.scheduling.flat_batch import FlatBatch, StepShape, flatten

# Runs a computation once and returns what runs it again, on the same tensors.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]

# The tokens of recorded steps with prefill. Few, because each costs about a second at load and some memory. Up to a few
# hundred tokens a step takes as long as reading the weights does, so padding costs little there; beyond, it costs its
# share, at most a third. Past 1,024 the device computes for longer than Python needs to launch its work.
PREFILL_SIZES = (16, 64, 128, 256, 384, 512, 768, 1024)


def batch_sizes(max_running: int) -> list[int]:
    """The numbers of decodes that are recorded, ascending: beyond 16, padding is at most a third and usually far less.

    Few sizes, because each costs a second at load and some memory.
    """
    steps = [1, 2, 4, 8, *range(16, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, max_running, 64)]
    return [*(size for size in steps if size < max_running), max_running]


def recorded_shapes(info: ModelInfo) -> tuple[list[StepShape], list[StepShape]]:
    """The shapes of decodes and of steps with prefill that are recorded, both ascending.

    Padding counts its positions like a sequence, so no shape has more tokens than a sequence may have.
    """
    decodes = [StepShape(size, only_decodes=True) for size in batch_sizes(info.max_running)]
    if info.state_bytes:
        return decodes, []  # what a chunk launches for recurrent layers depends on its length
    return decodes, [StepShape(size, only_decodes=False) for size in PREFILL_SIZES if size <= info.max_context]


def known_ids(tokens: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    """``tokens`` [tokens] as a model may look them up: ``-1 - r`` stands for ``sampled[r]``."""
    return torch.where(tokens < 0, sampled[(-1 - tokens).clamp(min=0)], tokens)


class RecordedSteps:
    """The recorded steps of one model.

    ``scratch_blocks`` are the blocks of the padding in each layer group, ``sampled`` what negative tokens stand for
    (``known_ids``). ``logits`` [max_running, vocabulary] in float32 never moves: every recorded step leaves there, from
    row 0 on, those of the rows that sample, and after them what padding made.

    Call inside of ``torch.inference_mode``.
    """

    def __init__(
        self,
        module: Any,
        attention: GraphAttention,
        info: ModelInfo,
        scratch_blocks: Sequence[int],
        record: Recorder,
        sampled: torch.Tensor,
        states: RecurrentStates | None = None,
        long_rope: LongRope | None = None,
    ) -> None:
        self._module = module
        self._attention = attention
        self._scratch_blocks = scratch_blocks
        self._record = record
        self._block_size = info.block_size
        self._windows = [group.window for group in info.groups]
        self._max_rows = info.max_running
        self._sampled = sampled
        self._device = torch.device(info.device)
        self._states = states
        self._long_rope = long_rope
        self._nothing = flatten([], info.block_size, self._windows, long_rope=long_rope is not None)
        self._scratch_slot = info.max_running + info.num_snapshots
        self._decodes, self._prefills = recorded_shapes(info)
        if states is not None:
            states.reserve(info.max_running)
        shapes = self._decodes + self._prefills
        attention.reserve(shapes, info.max_running, -(-info.max_context // info.block_size))
        most = max(shape.tokens for shape in shapes)
        self._inputs = StagedNumbers((2 if long_rope is None else 3) * most + info.max_running, self._device)
        self.logits = torch.zeros(info.max_running, info.vocab_size, device=self._device)
        self._replays: dict[StepShape, Callable[[], None]] = {}

    @property
    def shapes(self) -> list[StepShape]:
        """The shapes that are replayed."""
        return list(self._replays)

    def capture(self, progress: Progress) -> None:
        """Record the decodes, then the steps with prefill; takes seconds.

        Raises ``RuntimeError`` where a shape cannot be recorded. Then none of its kind is replayed, and decodes that
        were recorded before still are. Each kind begins with its largest, so that the smaller ones find its memory.
        """
        total = len(self._decodes) + len(self._prefills)
        for kind in (self._decodes, self._prefills):
            replays: dict[StepShape, Callable[[], None]] = {}
            for shape in reversed(kind):
                progress("recording steps", (len(self._replays) + len(replays)) / total)
                self._fill(self._nothing, shape)
                replays[shape] = self._record(partial(self._compute, shape))
            self._replays |= replays
        progress("recording steps", 1.0)

    def seconds(self) -> dict[StepShape, float]:
        """How long the device takes for each recorded shape, with short sequences and without sampling: measured."""
        found = {}
        for shape, replay in self._replays.items():
            self._fill(self._nothing, shape)
            replay()  # once before, because the first replay also brings the recording to the device
            self._wait()
            started = time.perf_counter()
            replay()
            self._wait()
            found[shape] = time.perf_counter() - started
        return found

    def shape_of(self, batch: FlatBatch) -> StepShape | None:
        """The shape that ``forward`` takes for this step; None for one of more than text, or of too many tokens."""
        special = (batch.position_axes, batch.embeddings, batch.key_limits)
        if special != (None, None, None) or len(batch.query_lengths) > self._max_rows:
            return None
        kind, count = self._decodes if batch.only_decodes else self._prefills, len(batch.tokens)
        return next((shape for shape in kind if shape.tokens >= count and shape in self._replays), None)

    def forward(self, batch: FlatBatch, shape: StepShape) -> torch.Tensor:
        """Logits of the chunks that sample, as ``ModelRunner.forward`` returns them: the first rows of ``logits``."""
        self._fill(batch, shape)
        self._replays[shape]()
        return self.logits[: len(batch.sample_rows)]

    def _fill(self, batch: FlatBatch, shape: StepShape) -> None:
        padded = batch.padded(shape, self._scratch_blocks, self._block_size, self._scratch_slot)
        rows = batch.sample_rows
        no_rows = array("i", [0]) * (self._num_rows(shape) - len(rows))
        numbers = padded.tokens + padded.positions + rows + no_rows
        self._inputs.upload(numbers if padded.long_tokens is None else numbers + padded.long_tokens)
        self._attention.fill(padded, shape)
        if self._states is not None:
            self._states.fill(padded)

    def _compute(self, shape: StepShape) -> None:
        self._attention.capture(shape)
        if self._states is not None:
            self._states.capture(shape)
        count, num_rows = shape.tokens, self._num_rows(shape)
        tokens, positions, rows = self._inputs.numbers[: 2 * count + num_rows].long().split((count, count, num_rows))
        rotating: AbstractContextManager[None] = nullcontext()
        if self._long_rope is not None:
            start = 2 * count + num_rows
            rotating = self._long_rope.rotating(self._inputs.numbers[start : start + count].bool())
        with rotating:
            output = self._module(
                input_ids=known_ids(tokens, self._sampled)[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=rows,
            )
        self.logits[:num_rows].copy_(output.logits[0])

    def _num_rows(self, shape: StepShape) -> int:
        return min(shape.tokens, self._max_rows)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


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

"""``engine.scheduling.contracts.Runner`` over the C forward: one call for all tokens of a step. No torch."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence as Chunks
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.api.engine import ModelInfo
from engine.api.errors import OutOfMemory
from engine.device.machine_memory import available_bytes, total_bytes
from engine.device.shortage import of_the_machine, ran_out, step_ran_out
from engine.native import library
from engine.scheduling.flat_batch import FlatBatch, flatten
from engine.scheduling.sequence import ScheduledChunk


@dataclass(slots=True)
class Decoder:
    """A model as the C code takes it, with everything that it points to."""

    model: library.Model
    vocab_size: int
    num_embeddings: int
    vector_scale: float
    kept: list[object] = field(default_factory=list)


class NativeRunner:
    """Computes batches with ``decoder`` on ``threads`` threads."""

    def __init__(self, code: Any, decoder: Decoder, info: ModelInfo, threads: int) -> None:
        self.info = info
        self.code = code
        self.decoder = decoder
        self._engine = code.castor_open(ctypes.byref(decoder.model), threads)
        if not self._engine:
            raise MemoryError("there is no memory, or there are no threads, for the native forward")
        weakref.finalize(self, code.castor_close, self._engine)
        self._logits = np.empty((0, decoder.model.head.num_panels * library.PANEL), np.float32)

    def forward(self, chunks: Chunks[ScheduledChunk]) -> np.ndarray:
        """Logits in float32, one row for each chunk that samples: [rows, vocabulary]. Valid until the next call."""
        return self.compute(flatten(chunks, self.info.block_size, [group.window for group in self.info.groups]))

    def compute(self, batch: FlatBatch) -> np.ndarray:
        """``forward`` of a step that is laid out already.

        Raises ``IndexError`` for a step beyond the cache, the context or the vocabulary, and ``NotImplementedError``
        for what the C code does not compute.
        """
        batch.require_none("position_axes", "key_limits", "long_tokens", by="the native forward")
        # The C code writes where it is told to: what lies outside of the cache is an error and not a crash.
        tables = array("i")
        for blocks, group in zip(batch.groups, self.info.groups, strict=True):
            given = np.frombuffer(blocks.tables, np.int32)
            if given.min() < 0 or given.max() >= group.num_blocks or max(batch.positions) >= self.info.max_context:
                raise IndexError("a step reaches beyond the blocks of the cache, or beyond the context")
            tables += blocks.tables
        # The tables of all groups are as long, and begin at the same places.
        starts = batch.groups[0].table_starts
        if not batch.only_decodes:  # the C code takes one for each token
            starts = array("i")
            for start, length in zip(batch.groups[0].table_starts, batch.query_lengths, strict=True):
                starts.extend(array("i", [start]) * length)
        ids, vectors = self._embedded(batch)
        wanted = len(batch.sample_rows)
        if len(self._logits) < wanted:  # kept: the page faults of fresh memory cost more than the product that fills it
            self._logits = np.empty((wanted, self._logits.shape[1]), np.float32)
        step = library.Batch(
            len(batch.tokens),
            wanted,
            len(batch.groups[0].tables),
            ids.buffer_info()[0],
            None if vectors is None else vectors.ctypes.data,
            *(values.buffer_info()[0] for values in (batch.positions, tables, starts, batch.sample_rows)),
            self._logits.ctypes.data,
        )
        if self.code.castor_forward(self._engine, ctypes.byref(step)) != 0:
            raise MemoryError(f"no memory for the activations of {len(batch.tokens)} tokens")
        return self._logits[:wanted, : self.decoder.vocab_size]

    def _embedded(self, batch: FlatBatch) -> tuple[array[int], np.ndarray | None]:
        """The tokens, and the vectors that stand for some of them: -1 means the first vector, -2 the next one."""
        ids, vectors = batch.tokens, None
        if batch.embeddings is not None:
            ids = array("i", ids)
            for number, row in enumerate(batch.embeddings.rows):
                ids[row] = -1 - number
            vectors = np.ascontiguousarray(
                np.asarray(batch.embeddings.vectors, np.float32) * np.float32(self.decoder.vector_scale)
            )
        given = np.frombuffer(ids, np.int32)
        if given.min() < -(0 if vectors is None else len(vectors)) or given.max() >= self.decoder.num_embeddings:
            raise IndexError("a step has tokens that are not in the vocabulary")
        return ids, vectors

    def check(self) -> None:
        """A CPU is never lost."""

    def shortage(self, error: BaseException) -> OutOfMemory | None:
        """What to say where memory ran out."""
        return step_ran_out(error, of_the_machine(available_bytes(), total_bytes())) if ran_out(error) else None

"""``engine.scheduling.contracts.Runner`` over the C forward: one call for all tokens of a step."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence as Chunks
from typing import Any

import torch

from engine.api.engine import ModelInfo
from engine.api.errors import OutOfMemory
from engine.device.device_memory import ran_out, step_ran_out
from engine.native import library
from engine.native.decoder import Decoder
from engine.native.packing import PANEL
from engine.scheduling.flat_batch import FlatBatch, flatten
from engine.scheduling.sequence import ScheduledChunk


class NativeRunner:
    """Computes batches with ``decoder`` on ``threads`` threads."""

    def __init__(self, code: Any, decoder: Decoder, info: ModelInfo, threads: int) -> None:
        self.info = info
        self._code = code
        self._decoder = decoder
        self._engine = code.castor_open(ctypes.byref(decoder.model), threads)
        if not self._engine:
            raise MemoryError("there is no memory, or there are no threads, for the native forward")
        weakref.finalize(self, code.castor_close, self._engine)
        self._logits = torch.empty(0, decoder.model.head.num_panels * PANEL)

    def forward(self, chunks: Chunks[ScheduledChunk]) -> torch.Tensor:
        """Logits in float32, one row for each chunk that samples: [rows, vocabulary]. Valid until the next call."""
        return self.compute(flatten(chunks, self.info.block_size, [group.window for group in self.info.groups]))

    def compute(self, batch: FlatBatch) -> torch.Tensor:
        """``forward`` of a step that is laid out already.

        Raises ``IndexError`` for a step beyond the cache, the context or the vocabulary, and ``NotImplementedError``
        for what the C code does not compute.
        """
        batch.require_none("position_axes", "key_limits", "long_tokens", by="the native forward")
        # The C code writes where it is told to: what lies outside of the cache is an error and not a crash.
        tables = array("i")
        for blocks, group in zip(batch.groups, self.info.groups, strict=True):
            least, most = torch.frombuffer(blocks.tables, dtype=torch.int32).aminmax()
            if least < 0 or most >= group.num_blocks or max(batch.positions) >= self.info.max_context:
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
            self._logits = torch.empty(wanted, self._logits.shape[1])
        step = library.Batch(
            len(batch.tokens),
            wanted,
            len(batch.groups[0].tables),
            ids.buffer_info()[0],
            None if vectors is None else vectors.data_ptr(),
            *(values.buffer_info()[0] for values in (batch.positions, tables, starts, batch.sample_rows)),
            self._logits.data_ptr(),
        )
        if self._code.castor_forward(self._engine, ctypes.byref(step)) != 0:
            raise MemoryError(f"no memory for the activations of {len(batch.tokens)} tokens")
        return self._logits[:wanted, : self._decoder.vocab_size]

    def _embedded(self, batch: FlatBatch) -> tuple[array[int], torch.Tensor | None]:
        """The tokens, and the vectors that stand for some of them: -1 means the first vector, -2 the next one."""
        ids, vectors = batch.tokens, None
        if batch.embeddings is not None:
            ids = array("i", ids)
            for number, row in enumerate(batch.embeddings.rows):
                ids[row] = -1 - number
            vectors = (batch.embeddings.vectors.float() * self._decoder.vector_scale).contiguous()
        least, most = torch.frombuffer(ids, dtype=torch.int32).aminmax()
        if least < -(0 if vectors is None else len(vectors)) or most >= self._decoder.num_embeddings:
            raise IndexError("a step has tokens that are not in the vocabulary")
        return ids, vectors

    def check(self) -> None:
        """A CPU is never lost."""

    def shortage(self, error: BaseException) -> OutOfMemory | None:
        """What to say where memory ran out."""
        return step_ran_out(error, torch.device("cpu")) if ran_out(error) else None

"""``engine.scheduling.contracts.Runner`` over the C forward: one call for all tokens of a step."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence as Batch
from typing import Any

import torch
from torch import nn

from engine.api.engine import ModelInfo
from engine.native import library
from engine.native.decoder import Decoder
from engine.native.packing import PANEL
from engine.scheduling.sequence import ScheduledChunk


class NativeRunner:
    """Computes batches with ``decoder`` on ``threads`` threads; the embedding stays a module of the model."""

    def __init__(self, code: Any, decoder: Decoder, embedding: nn.Module, info: ModelInfo, threads: int) -> None:
        self.info = info
        self._code = code
        self._decoder = decoder
        self._embedding = embedding
        self._engine = code.castor_open(ctypes.byref(decoder.model), threads)
        if not self._engine:
            raise MemoryError("there is no memory, or there are no threads, for the native forward")
        weakref.finalize(self, code.castor_close, self._engine)
        self._logits = torch.empty(0, decoder.model.head.num_panels * PANEL)

    def forward(self, batch: Batch[ScheduledChunk]) -> torch.Tensor:
        """Logits in float32, one row for each chunk that samples: [rows, vocabulary]. Valid until the next call."""
        ids, positions, starts, tables, rows = array("i"), array("i"), array("i"), array("i"), array("i")
        for chunk in batch:
            ids.extend(chunk.sequence.tokens[chunk.start : chunk.start + chunk.num_tokens])
            positions.extend(range(chunk.start, chunk.start + chunk.num_tokens))
            starts.extend([len(tables)] * chunk.num_tokens)
            tables.extend(chunk.sequence.blocks)
            if chunk.samples:
                rows.append(len(ids) - 1)
        self._require_within(batch, tables)
        with torch.inference_mode():
            states = self._embedding(torch.tensor(ids)).float().contiguous()
        logits = self._room(len(rows))
        step = library.Batch(
            len(ids),
            len(rows),
            *(values.buffer_info()[0] for values in (positions, tables, starts, rows)),
            states.data_ptr(),
            logits.data_ptr(),
        )
        if self._code.castor_forward(self._engine, ctypes.byref(step)) != 0:
            raise MemoryError(f"no memory for the activations of {len(ids)} tokens")
        return logits[:, : self._decoder.vocab_size]

    def check(self) -> None:
        """A CPU is never lost."""

    def _require_within(self, batch: Batch[ScheduledChunk], tables: array[int]) -> None:
        """The C code writes where it is told to; what lies outside of the cache is an error and not a crash."""
        least, most = torch.frombuffer(tables, dtype=torch.int32).aminmax()
        ends = ((chunk.start + chunk.num_tokens, len(chunk.sequence.blocks)) for chunk in batch)
        if (
            least < 0
            or most >= self.info.num_blocks
            or any(end > min(self.info.max_context, count * self.info.block_size) for end, count in ends)
        ):
            raise IndexError("a step reaches beyond the pages of its sequences, of the cache, or beyond the context")

    def _room(self, rows: int) -> torch.Tensor:
        """Kept from step to step: the page faults of fresh memory cost more than the product that fills it."""
        if len(self._logits) < rows:
            self._logits = torch.empty(rows, self._logits.shape[1])
        return self._logits[:rows]

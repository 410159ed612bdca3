"""The contract between a model's attention layers and whatever computes them over the paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from engine.api.block_groups import Window
from engine.scheduling.flat_batch import FlatBatch, StepShape


class AttentionOptions(NamedTuple):
    """What a layer asks for beyond plain causal attention; all of it changes the result.

    ``scaling`` multiplies the scores. ``sliding_window`` is the number of keys that a query sees, itself included.
    ``softcap`` bounds the scores to ``softcap * tanh(score / softcap)``. ``sinks`` are one learned score for each
    query head [heads] that takes its share of the softmax and has no value. ``chunk_size`` has a query see the keys of
    its own chunk of so many tokens, counted from the first of the sequence; a layer has that or a sliding window.
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    chunk_size: int | None = None

    @property
    def window(self) -> Window | None:
        """What a query sees of the past; None: all of it."""
        if self.chunk_size is not None:
            return Window(self.chunk_size, chunked=True)
        return None if self.sliding_window is None else Window(self.sliding_window)


class AttentionBackend(Protocol):
    """Reads and writes the paged cache for every layer of one model.

    The backend owns what ``prepare`` builds; it stays valid until the next ``prepare``. The cache's blocks belong to
    the block pool: a backend writes only the slots of the batch that it was prepared for.
    """

    def prepare(self, batch: FlatBatch) -> None:
        """Build the index tensors of one step, once for all layers.

        Raises ``ValueError`` where the batch has other layer groups than the cache, and ``NotImplementedError`` for
        optional fields of the batch that change attention and are not computed by this backend.
        """
        ...

    def write_kv(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the batch's new keys and values, [tokens, kv heads, key or value size], in the layer's blocks.

        Where values lie in the keys (``KVShape.values_in_keys``), only keys are stored.
        """
        ...

    def attend(self, layer: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        """Attend from ``query`` [tokens, heads, key size] to what each token sees: [tokens, heads, value size].

        That is its own past, and where the batch has ``key_limits`` also what follows in its chunk up to there. The
        keys and values of the batch itself have been written before.
        """
        ...


@runtime_checkable
class GraphAttention(AttentionBackend, Protocol):
    """A backend whose kernels can be recorded for steps of one shape and replayed for other steps of that shape."""

    def reserve(self, shapes: Sequence[StepShape], max_sequences: int, max_blocks: int) -> None:
        """Make the buffers of recorded steps of these ``shapes``.

        A step has up to ``max_sequences`` chunks and, where tokens are missing, what ``FlatBatch.padded`` adds. Block
        tables have up to ``max_blocks`` entries.
        """
        ...

    def capture(self, shape: StepShape) -> None:
        """Read what a step of this ``shape`` is from those buffers, until the next ``prepare``."""
        ...

    def fill(self, batch: FlatBatch, shape: StepShape) -> None:
        """Copy a step of this ``shape`` to those buffers."""
        ...

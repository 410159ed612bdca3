"""The contract between a model's attention layers and whatever computes them over the paged cache."""

from __future__ import annotations

from collections.abc import Sequence as Batch
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from engine.scheduling.sequence import ScheduledChunk


class AttentionOptions(NamedTuple):
    """What a layer asks for beyond plain causal attention; all of it changes the result.

    ``scaling`` multiplies the scores. ``sliding_window`` is the number of keys that a query sees, itself included.
    ``softcap`` bounds the scores to ``softcap * tanh(score / softcap)``. ``sinks`` are one learned score for each
    query head [heads] that takes its share of the softmax and has no value.
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


class AttentionBackend(Protocol):
    """Reads and writes the paged cache for every layer of one model.

    The backend owns what ``prepare`` builds; it stays valid until the next ``prepare``. The cache's pages belong to the
    block pool: a backend writes only the slots of the batch that it was prepared for.
    """

    def prepare(self, batch: Batch[ScheduledChunk]) -> None:
        """Build the index tensors of one step, once for all layers. The batch's tokens lie one after another."""
        ...

    def write_kv(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the batch's new keys and values, [tokens, kv heads, key or value size], in the layer's pages."""
        ...

    def attend(self, layer: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        """Attend from ``query`` [tokens, heads, key size] to each token's own past: [tokens, heads, value size].

        The keys and values of the batch itself have been written before.
        """
        ...


@runtime_checkable
class GraphAttention(AttentionBackend, Protocol):
    """A backend whose kernels can be recorded for a number of decodes and replayed for other decodes."""

    def reserve(self, max_batch: int, max_blocks: int) -> None:
        """Make the buffers of recorded steps: up to ``max_batch`` decodes whose tables have up to ``max_blocks``."""
        ...

    def capture(self, size: int) -> None:
        """Read what a step of ``size`` decodes is from those buffers, until the next ``prepare``."""
        ...

    def fill(self, batch: Batch[ScheduledChunk], size: int, scratch_block: int) -> None:
        """Tell those buffers of a step of decodes, padded to ``size``.

        What is padded writes to and attends to ``scratch_block``, which no sequence owns.
        """
        ...

"""Attention by gathering blocks and calling torch: exact on every device, the path of CPUs.

The sequences of a step form groups that are computed in one call each: decodes of similar length together, padded to
the longest; each prefill chunk alone. Blocks are gathered whole, into memory that is kept: on a CPU the page faults of
fresh tensors cost five times the copy itself.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import torch
from torch.nn import functional

from engine.api.block_groups import Window
from engine.attention.base import AttentionOptions
from engine.cache.fp8 import dequantise, quantise
from engine.cache.kv_tensors import KVCache
from engine.scheduling.flat_batch import FlatBatch, GroupBlocks


class _Call(NamedTuple):
    """Sequences that are computed in one call: each has ``queries`` tokens and is given equally many blocks.

    ``tokens`` are the places of their tokens in the batch [sequences * queries], ``tables`` their blocks one after
    another [sequences * blocks], and ``mask`` is added to the scores [sequences, 1, queries, blocks * block size].
    """

    sequences: int
    queries: int
    tokens: torch.Tensor
    tables: torch.Tensor
    mask: torch.Tensor


class ReferenceAttention:
    """``AttentionBackend`` over a ``KVCache``."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._batch: FlatBatch | None = None
        # Of the step, by layer group and window, made for the first layer that asks; the slots by layer group.
        self._calls: dict[tuple[int, Window | None], list[_Call]] = {}
        self._slots: list[torch.Tensor] = []
        self._scratch: dict[str, torch.Tensor] = {}

    def prepare(self, batch: FlatBatch) -> None:
        if len(batch.groups) != self._cache.num_groups:
            raise ValueError(
                f"the step has {len(batch.groups)} layer groups, and the cache {self._cache.num_groups}; make both of "
                "the same layers"
            )
        self._slots = [self._on_device(blocks.slots) for blocks in batch.groups]
        self._batch = batch
        self._calls.clear()

    def write_kv(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        # A block outlives the sequence that wrote it, and a masked slot still enters the sums as 0 * value: a number
        # that is not finite would reach whoever gets the block next.
        cache, slots = self._cache, self._slots[self._cache.groups[layer]]
        parts = [(cache.keys[layer], cache.key_scales[layer], keys)]
        if not cache.values_in_keys[layer]:
            parts.append((cache.values[layer], cache.value_scales[layer], values))
        for blocks, scales, new in parts:
            numbers = new.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            if scales is not None:
                numbers, new_scales = quantise(numbers)
                # As bytes: torch copies no float8 by index.
                blocks, numbers = blocks.view(torch.uint8), numbers.view(torch.uint8)
                scales.flatten(0, 1).index_copy_(0, slots, new_scales)
            blocks.flatten(0, 1).index_copy_(0, slots, numbers)

    def attend(self, layer: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        cache = self._cache
        out = query.new_empty(query.shape[0], query.shape[1], cache.values[layer].shape[3])
        for call in self._calls_of(cache.groups[layer], options.window):
            # Values in the keys: whole keys are mixed, which torch's kernel for CPUs needs (it wants both of one size),
            # and of the result their part is taken.
            k = v = self._gather("keys", cache.keys[layer], cache.key_scales[layer], call)
            if not cache.values_in_keys[layer]:
                v = self._gather("values", cache.values[layer], cache.value_scales[layer], call)
            q = query[call.tokens].unflatten(0, (call.sequences, call.queries)).transpose(1, 2)
            if options.softcap is None and options.sinks is None:
                grouped = q.shape[1] != k.shape[1]
                attended = functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=call.mask, scale=options.scaling, enable_gqa=grouped
                )
            else:
                attended = _explicit_attention(q, k, v, call.mask, options)
            out[call.tokens] = attended[..., : out.shape[2]].transpose(1, 2).flatten(0, 1)
        return out

    def _calls_of(self, group: int, window: Window | None) -> list[_Call]:
        """The calls of this step for the layers of a group that have this window.

        Decodes whose numbers of blocks have equally many binary digits share a call: at most half is padding.
        """
        if (group, window) in self._calls:
            return self._calls[group, window]
        batch = self._batch
        assert batch is not None, "prepare comes first"
        decodes: dict[int, list[int]] = {}
        for chunk in batch.decodes:
            digits = len(_seen_blocks(batch, chunk, window, self._cache.block_size)).bit_length()
            decodes.setdefault(digits, []).append(chunk)
        together = [*decodes.values(), *([chunk] for chunk in batch.prefills)]
        calls = [self._make_call(batch, batch.groups[group], chunks, window) for chunks in together]
        self._calls[group, window] = calls
        return calls

    def _make_call(self, batch: FlatBatch, blocks: GroupBlocks, chunks: list[int], window: Window | None) -> _Call:
        """The call of ``chunks``, which have equally many tokens."""
        size, queries = self._cache.block_size, batch.query_lengths[chunks[0]]
        seen = [_seen_blocks(batch, chunk, window, size) for chunk in chunks]
        width = max(len(numbers) for numbers in seen)
        tables, tokens, positions, limits = array("i"), array("i"), array("i"), array("i")
        for chunk, numbers in zip(chunks, seen, strict=True):
            begin = blocks.table_starts[chunk]
            table = blocks.tables[begin + numbers.start : begin + numbers.stop]
            # Padding repeats the sequence's own last block; the mask hides it.
            tables += table + table[-1:] * (width - len(table))
            first = batch.query_starts[chunk]
            tokens.extend(range(first, first + queries))
            positions += batch.positions[first : first + queries]
            if batch.key_limits is not None:
                limits += batch.key_limits[first : first + queries]
        asking = self._on_device(positions).view(-1, 1, queries, 1)
        limit = asking + 1 if batch.key_limits is None else self._on_device(limits).view_as(asking)
        origins = torch.tensor([numbers.start * size for numbers in seen], device=asking.device)
        asked = origins.view(-1, 1, 1, 1) + torch.arange(width * size, device=asking.device)
        hidden = asked >= limit
        if window is not None:
            hidden |= asked < _first_seen(asking, window)
        return _Call(
            sequences=len(chunks),
            queries=queries,
            tokens=self._on_device(tokens),
            tables=self._on_device(tables),
            mask=torch.zeros(hidden.shape, dtype=self._cache.dtype, device=hidden.device).masked_fill_(
                hidden, float("-inf")
            ),
        )

    def _gather(self, name: str, blocks: torch.Tensor, scales: torch.Tensor | None, call: _Call) -> torch.Tensor:
        """The call's blocks side by side: [sequences, kv heads, blocks * block size, size]."""
        if scales is not None:
            numbers = blocks.view(torch.uint8)[call.tables].view(blocks.dtype)
            wide = dequantise(numbers, scales[call.tables], self._cache.dtype)
            return wide.view(call.sequences, -1, *blocks.shape[2:]).transpose(1, 2)
        flat = blocks.flatten(1)
        needed = len(call.tables) * flat.shape[1]
        scratch = self._scratch.get(name)
        if scratch is None or len(scratch) < needed:
            scratch = self._scratch[name] = flat.new_empty(needed)
        gathered = scratch[:needed].view(len(call.tables), flat.shape[1])
        torch.index_select(flat, 0, call.tables, out=gathered)
        return gathered.view(call.sequences, -1, *blocks.shape[2:]).transpose(1, 2)

    def _on_device(self, numbers: array[int]) -> torch.Tensor:
        return torch.frombuffer(numbers, dtype=torch.int32).to(self._cache.device, torch.long)


def _first_seen(positions: torch.Tensor, window: Window) -> torch.Tensor:
    """``Window.first_seen`` of many positions; where that is the first token, a number below it will do."""
    return positions // window.size * window.size if window.chunked else positions - window.size + 1


def _seen_blocks(batch: FlatBatch, chunk: int, window: Window | None, block_size: int) -> range:
    """Which blocks of the sequence's table the chunk's tokens can see."""
    start, num_keys = batch.positions[batch.query_starts[chunk]], batch.num_keys(chunk)
    first = 0 if window is None else window.first_seen(start)
    return range(first // block_size, (num_keys - 1) // block_size + 1)


def _explicit_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    """The formula itself in float32, for what torch's kernel does not offer: soft caps and sinks.

    q [n, heads, queries, size] and k, v [n, kv heads, keys, size] make [n, heads, queries, value size].
    """
    grouped = q.float().unflatten(1, (k.shape[1], -1))
    scores = grouped @ k.float().unsqueeze(2).transpose(-1, -2) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.flatten(1, 2) + mask
    if options.sinks is not None:
        sinks = options.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    mixed = weights.unflatten(1, (k.shape[1], -1)) @ v.float().unsqueeze(2)
    return mixed.flatten(1, 2).to(q.dtype)

"""Attention by gathering pages and calling torch: exact on every device, the path of CPUs.

The sequences of a step form groups that are computed in one call each: decodes of similar length together, padded to
the longest; each prefill chunk alone. Pages are gathered whole, into memory that is kept: on a CPU the page faults of
fresh tensors cost five times the copy itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Batch
from typing import NamedTuple

import torch
from torch.nn import functional

from engine.attention.base import AttentionOptions
from engine.cache.kv_tensors import KVCache
from engine.scheduling.sequence import ScheduledChunk


class _Group(NamedTuple):
    """Sequences that are computed in one call: each has ``queries`` tokens and is given equally many pages.

    ``tokens`` are the places of their tokens in the batch [sequences * queries], ``tables`` their pages one after
    another [sequences * pages], and ``mask`` is added to the scores [sequences, 1, queries, pages * block size].
    """

    sequences: int
    queries: int
    tokens: torch.Tensor
    tables: torch.Tensor
    mask: torch.Tensor


class _Span(NamedTuple):
    """A chunk with the place of its first token in the batch."""

    chunk: ScheduledChunk
    first_token: int


class ReferenceAttention:
    """``AttentionBackend`` over a ``KVCache``. ``windows`` are the sliding windows that the model's layers use."""

    def __init__(self, cache: KVCache, windows: Iterable[int | None]) -> None:
        self._cache = cache
        self._windows = frozenset(windows)
        self._groups: dict[int | None, list[_Group]] = {}
        self._slots = torch.empty(0, dtype=torch.long, device=cache.device)
        self._scratch: dict[str, torch.Tensor] = {}

    def prepare(self, batch: Batch[ScheduledChunk]) -> None:
        spans, first = [], 0
        for chunk in batch:
            spans.append(_Span(chunk, first))
            first += chunk.num_tokens
        size = self._cache.block_size
        slots = [_slot(chunk, i, size) for chunk in batch for i in range(chunk.start, chunk.start + chunk.num_tokens)]
        self._slots = torch.tensor(slots, device=self._cache.device)
        self._groups = {window: self._make_groups(spans, window) for window in self._windows}

    def write_kv(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        # A page outlives the sequence that wrote it, and a masked slot still enters the sums as 0 * value: a number
        # that is not finite would reach whoever gets the page next.
        for pages, new in ((self._cache.keys[layer], keys), (self._cache.values[layer], values)):
            pages.flatten(0, 1).index_copy_(0, self._slots, new.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))

    def attend(self, layer: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        out = query.new_empty(query.shape[0], query.shape[1], values.shape[3])
        for group in self._groups[options.sliding_window]:
            k = self._gather("keys", keys, group)
            v = self._gather("values", values, group)
            q = query[group.tokens].unflatten(0, (group.sequences, group.queries)).transpose(1, 2)
            attended = _attention(q, k, v, group.mask, options)
            out[group.tokens] = attended.transpose(1, 2).flatten(0, 1)
        return out

    def _make_groups(self, spans: list[_Span], window: int | None) -> list[_Group]:
        """Decodes whose numbers of pages have equally many binary digits share a group: at most half is padding."""
        prefills = [[span] for span in spans if span.chunk.num_tokens > 1]
        decodes: dict[int, list[_Span]] = {}
        for span in spans:
            if span.chunk.num_tokens == 1:
                digits = len(_pages(span.chunk, window, self._cache.block_size)).bit_length()
                decodes.setdefault(digits, []).append(span)
        return [self._make_group(members, window) for members in (*decodes.values(), *prefills)]

    def _make_group(self, spans: list[_Span], window: int | None) -> _Group:
        size, device = self._cache.block_size, self._cache.device
        queries = spans[0].chunk.num_tokens
        pages = [_pages(span.chunk, window, size) for span in spans]
        width = max(len(numbers) for numbers in pages)
        tables = [
            # Padding repeats the sequence's own last page; the mask hides it.
            [span.chunk.sequence.blocks[min(numbers.start + i, numbers.stop - 1)] for i in range(width)]
            for span, numbers in zip(spans, pages, strict=True)
        ]
        tokens = [span.first_token + i for span in spans for i in range(queries)]
        starts = torch.tensor([span.chunk.start for span in spans], device=device)
        origins = torch.tensor([numbers.start * size for numbers in pages], device=device)
        mask = _mask(starts, origins, queries, width * size, window)
        return _Group(
            sequences=len(spans),
            queries=queries,
            tokens=torch.tensor(tokens, device=device),
            tables=torch.tensor(tables, device=device).flatten(),
            mask=torch.zeros(mask.shape, dtype=self._cache.dtype, device=device).masked_fill_(~mask, float("-inf")),
        )

    def _gather(self, name: str, pages: torch.Tensor, group: _Group) -> torch.Tensor:
        """The group's pages side by side: [sequences, kv heads, blocks * block size, size]."""
        flat = pages.flatten(1)
        needed = len(group.tables) * flat.shape[1]
        scratch = self._scratch.get(name)
        if scratch is None or len(scratch) < needed:
            scratch = self._scratch[name] = flat.new_empty(needed)
        gathered = scratch[:needed].view(len(group.tables), flat.shape[1])
        torch.index_select(flat, 0, group.tables, out=gathered)
        return gathered.view(group.sequences, -1, *pages.shape[2:]).transpose(1, 2)


def _slot(chunk: ScheduledChunk, position: int, block_size: int) -> int:
    return chunk.sequence.blocks[position // block_size] * block_size + position % block_size


def _pages(chunk: ScheduledChunk, window: int | None, block_size: int) -> range:
    """Which of the sequence's pages the chunk's queries can see."""
    first = 0 if window is None else max(0, chunk.start - window + 1)
    return range(first // block_size, (chunk.start + chunk.num_tokens - 1) // block_size + 1)


def _mask(starts: torch.Tensor, origins: torch.Tensor, queries: int, keys: int, window: int | None) -> torch.Tensor:
    """Who sees whom, [sequences, 1, queries, keys]; key ``j`` of a sequence stands at position ``origin + j``."""
    asking = starts[:, None, None, None] + torch.arange(queries, device=starts.device)[:, None]
    asked = origins[:, None, None, None] + torch.arange(keys, device=starts.device)
    seen = asked <= asking
    return seen if window is None else seen & (asked > asking - window)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    """q [n, heads, queries, size] and k, v [n, kv heads, keys, size] make [n, heads, queries, value size]."""
    if options.softcap is None and options.sinks is None:
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=options.scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    return _explicit_attention(q, k, v, mask, options)


def _explicit_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    """The formula itself in float32, for what torch's kernel does not offer: soft caps and sinks."""
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

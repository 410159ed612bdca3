"""The reference backend against the formula in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch
from support.attention_bounds import assert_within, attended
from support.paged import make_sequence

from engine.attention.base import AttentionOptions
from engine.attention.gather import ReferenceAttention
from engine.cache.kv_tensors import KVCache
from engine.cache.layout import KVShape
from engine.scheduling.flat_batch import flatten
from engine.scheduling.sequence import ScheduledChunk

HEADS, BLOCK = 4, 4
SHAPE = KVShape(heads=2, key_size=8, value_size=6)
OPTIONS = {
    "plain": AttentionOptions(0.3),
    "window": AttentionOptions(0.3, sliding_window=5),
    "softcap": AttentionOptions(0.7, softcap=1.5),
    "sinks": AttentionOptions(0.3, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "all": AttentionOptions(0.7, sliding_window=6, softcap=2.0, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_decodes_and_chunks_of_one_batch(options: AttentionOptions) -> None:
    torch.manual_seed(0)
    cache = KVCache([SHAPE], 64, BLOCK, dtype=torch.float32, device=torch.device("cpu"))
    backend = ReferenceAttention(cache, {options.sliding_window})
    rnd = random.Random(0)
    free = rnd.sample(range(64), 64)
    chunks = []
    # (tokens known before, tokens computed now): fresh, continued and decoding sequences of unlike lengths
    for past, count in ((0, 7), (30, 1), (2, 1), (13, 5), (0, 1), (31, 1)):
        blocks = [free.pop() for _ in range(-(-(past + count) // BLOCK))]
        chunks.append(ScheduledChunk(make_sequence([1] * (past + count), blocks), past, count))
    texts = [(torch.randn(w.start + w.num_tokens, 2, 8), torch.randn(w.start + w.num_tokens, 2, 6)) for w in chunks]
    for chunk, (k, v) in zip(chunks, texts, strict=True):
        if chunk.start:
            backend.prepare(flatten([ScheduledChunk(chunk.sequence, 0, chunk.start)], BLOCK))
            backend.write_kv(0, k[: chunk.start], v[: chunk.start])
    query = torch.randn(sum(chunk.num_tokens for chunk in chunks), HEADS, 8)
    backend.prepare(flatten(chunks, BLOCK))
    backend.write_kv(
        0,
        torch.cat([k[w.start :] for w, (k, _) in zip(chunks, texts, strict=True)]),
        torch.cat([v[w.start :] for w, (_, v) in zip(chunks, texts, strict=True)]),
    )
    found = backend.attend(0, query, options)
    first = 0
    for chunk, (k, v) in zip(chunks, texts, strict=True):
        own = slice(first, first + chunk.num_tokens)
        assert_within(found[own], *attended(query[own], k, v, chunk.start, options))
        first += chunk.num_tokens


def test_numbers_that_are_not_finite_do_not_reach_the_next_owner_of_a_block() -> None:
    cache = KVCache([SHAPE], 1, BLOCK, dtype=torch.float32, device=torch.device("cpu"))
    backend = ReferenceAttention(cache, {None})
    broken = torch.full((BLOCK, 2, 8), math.nan)
    backend.prepare(flatten([ScheduledChunk(make_sequence([1] * BLOCK, [0]), 0, BLOCK)], BLOCK))
    backend.write_kv(0, broken, torch.full((BLOCK, 2, 6), math.inf))
    torch.manual_seed(0)
    k, v, q = torch.randn(1, 2, 8), torch.randn(1, 2, 6), torch.randn(1, HEADS, 8)
    backend.prepare(flatten([ScheduledChunk(make_sequence([1], [0]), 0, 1)], BLOCK))
    backend.write_kv(0, k, v)
    out = backend.attend(0, q, AttentionOptions(0.3))
    torch.testing.assert_close(out, v.repeat_interleave(2, dim=1))

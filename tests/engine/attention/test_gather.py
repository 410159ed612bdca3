"""The reference backend against the formula in float64."""

from __future__ import annotations

import math
import random
from array import array

import pytest
import torch
from support.attention_bounds import assert_within, attended
from support.paged import make_sequence

from engine.attention.base import AttentionOptions
from engine.attention.gather import ReferenceAttention
from engine.cache.fp8 import dequantise, quantise
from engine.cache.kv_tensors import KVCache
from engine.cache.layout import KVShape
from engine.scheduling.flat_batch import flatten
from engine.scheduling.sequence import ScheduledChunk

HEADS, BLOCK = 4, 4
SHAPE = KVShape(heads=2, key_size=8, value_size=6)
OPTIONS = {
    "plain": AttentionOptions(0.3),
    "window": AttentionOptions(0.3, sliding_window=5),
    "chunks": AttentionOptions(0.3, chunk_size=6),
    "softcap": AttentionOptions(0.7, softcap=1.5),
    "sinks": AttentionOptions(0.3, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "all": AttentionOptions(0.7, sliding_window=6, softcap=2.0, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_decodes_and_chunks_of_one_batch(options: AttentionOptions, fp8: bool) -> None:
    torch.manual_seed(0)
    cache = KVCache([SHAPE], 64, BLOCK, dtype=torch.float32, device=torch.device("cpu"), fp8=fp8)
    backend = ReferenceAttention(cache)
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
        if fp8:
            k, v = (dequantise(*quantise(numbers), torch.float32) for numbers in (k, v))
        own = slice(first, first + chunk.num_tokens)
        assert_within(found[own], *attended(query[own], k, v, chunk.start, options))
        first += chunk.num_tokens


@pytest.mark.parametrize("fp8", [False, True])
def test_numbers_that_are_not_finite_do_not_reach_the_next_owner_of_a_block(fp8: bool) -> None:
    cache = KVCache([SHAPE], 1, BLOCK, dtype=torch.float32, device=torch.device("cpu"), fp8=fp8)
    backend = ReferenceAttention(cache)
    broken = torch.full((BLOCK, 2, 8), math.nan)
    backend.prepare(flatten([ScheduledChunk(make_sequence([1] * BLOCK, [0]), 0, BLOCK)], BLOCK))
    backend.write_kv(0, broken, torch.full((BLOCK, 2, 6), math.inf))
    torch.manual_seed(0)
    k, v, q = torch.randn(1, 2, 8), torch.randn(1, 2, 6), torch.randn(1, HEADS, 8)
    backend.prepare(flatten([ScheduledChunk(make_sequence([1], [0]), 0, 1)], BLOCK))
    backend.write_kv(0, k, v)
    out = backend.attend(0, q, AttentionOptions(0.3))
    expected = dequantise(*quantise(v), torch.float32) if fp8 else v
    torch.testing.assert_close(out, expected.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("window", [None, 5])
def test_key_limits_equal_a_plain_masked_attention(window: int | None) -> None:
    """Tokens 4 to 8 of the chunk are an image: each of them sees all of it."""
    torch.manual_seed(0)
    past, count = 6, 11
    cache = KVCache([SHAPE], 8, BLOCK, dtype=torch.float32, device=torch.device("cpu"))
    backend = ReferenceAttention(cache)
    limits = [past + 9 if 4 <= i < 9 else past + i + 1 for i in range(count)]
    keys, values = torch.randn(past + count, 2, 8), torch.randn(past + count, 2, 6)
    query = torch.randn(count, HEADS, 8)
    sequence, other = make_sequence([1] * (past + count), [5, 0, 7, 2, 3]), make_sequence([1], [6])
    backend.prepare(flatten([ScheduledChunk(sequence, 0, past)], BLOCK))
    backend.write_kv(0, keys[:past], values[:past])
    # A decode before it: limits are told for the tokens of the whole step.
    chunks = [ScheduledChunk(other, 0, 1), ScheduledChunk(sequence, past, count)]
    backend.prepare(flatten(chunks, BLOCK, key_limits=array("i", [1, *limits])))
    backend.write_kv(0, torch.cat([keys[:1], keys[past:]]), torch.cat([values[:1], values[past:]]))
    found = backend.attend(0, torch.cat([query[:1], query]), AttentionOptions(0.3, sliding_window=window))[1:]
    places = torch.arange(past + count)
    seen = places < torch.tensor(limits)[:, None]
    if window is not None:
        seen &= places > places[past:, None] - window
    scores = torch.einsum("qhd,khd->hqk", query, keys.repeat_interleave(2, dim=1)) * 0.3
    weights = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
    expected = torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(2, dim=1))
    torch.testing.assert_close(found, expected)


def test_a_step_of_other_layer_groups_than_the_cache_is_refused() -> None:
    cache = KVCache([SHAPE, SHAPE._replace(group=1)], 2, BLOCK, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="the step has 1 layer groups, and the cache 2"):
        ReferenceAttention(cache).prepare(flatten([ScheduledChunk(make_sequence([1], [0]), 0, 1)], BLOCK))

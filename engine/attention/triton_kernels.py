"""The kernels of the paged attention in Triton: write keys and values, attend from decodes, attend from chunks.

No ``from __future__ import annotations`` here: Triton's interpreter looks at the annotations themselves.

What a step is lies in one array of int32, ``index``, whose parts ``engine.attention.step_index`` describes. All query
heads of one key-value head share a program, which reads their keys and values once. Programs without a part in the step
return at once, so that one recorded grid fits all steps of a shape.
"""

from typing import Any

import triton
import triton.language as tl

from engine.cache import fp8

LOG2E = tl.constexpr(1.4426950408889634)
# Numbers that differ from step to step are not specialised: a kernel made anew for one that happens to be 1 or a
# multiple of 16 would stop a running server for a second. Strides are: known multiples of 16 make loads 16 bytes wide.
_VARYING = ("num_tokens", "work_at", "work_size", "chunks_at", "chunks_size", "tables_at")
# How many lengths of chunks are looked at together; a step seldom has more.
_CHUNKS = tl.constexpr(512)
_ROUND_UP = tl.constexpr(fp8.ROUND_UP)
_LARGEST_EXPONENT = tl.constexpr(fp8.LARGEST_EXPONENT)
_LEAST_SCALE = tl.constexpr(fp8.LEAST_SCALE)


@triton.jit(do_not_specialize=_VARYING)
def write_kernel(
    index: "Any", keys: "Any", values: "Any", key_scales: "Any", value_scales: "Any", new_keys: "Any",
    new_values: "Any", num_tokens: "Any", tables_at: "Any", token_stride: "Any", head_stride: "Any",
    value_token_stride: "Any", value_head_stride: "Any",
    KV_HEADS: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAIRS: tl.constexpr, FP8: tl.constexpr,
) -> None:  # fmt: skip
    """One program for ``PAIRS`` pairs of token and kv head: their keys and values into the tokens' slots.

    Blocks are [slots, kv heads, size], and with ``FP8`` scales [slots, kv heads] (``engine.cache.fp8``). What is not
    finite becomes 0; see ``ReferenceAttention.write_kv`` for why nothing else may enter a block.
    """
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    token, head = pair // KV_HEADS, pair % KV_HEADS
    there = token < num_tokens
    position = tl.load(index + token, mask=there, other=0)
    table = tl.load(index + num_tokens + token, mask=there, other=0)
    block = tl.load(index + tables_at + table + position // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
    page = (block * BLOCK_SIZE + position % BLOCK_SIZE) * KV_HEADS + head
    k, v = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    at, mask = token * token_stride + head * head_stride, there[:, None] & (k < KEY_SIZE)[None, :]
    key = tl.load(new_keys + at[:, None] + k[None, :], mask=mask, other=0.0)
    _store(keys + page[:, None] * KEY_SIZE + k[None, :], key_scales + page, _finite(key), mask, there, FP8)
    at, mask = token * value_token_stride + head * value_head_stride, there[:, None] & (v < VALUE_SIZE)[None, :]
    value = tl.load(new_values + at[:, None] + v[None, :], mask=mask, other=0.0)
    _store(values + page[:, None] * VALUE_SIZE + v[None, :], value_scales + page, _finite(value), mask, there, FP8)


@triton.jit
def _store(place: "Any", scale: "Any", numbers: "Any", mask: "Any", there: "Any", FP8: tl.constexpr) -> None:
    """Rows of ``numbers``, 0 where they are not in ``mask``; with ``FP8`` as ``fp8.quantise`` makes them."""
    if FP8:
        wide = numbers.to(tl.float32)
        largest = tl.max(tl.abs(wide), 1).to(tl.int32, bitcast=True)
        power = tl.maximum(((largest + _ROUND_UP) >> 23) - _LARGEST_EXPONENT, _LEAST_SCALE)
        inverse = ((254 - power) << 23).to(tl.float32, bitcast=True)
        tl.store(scale, power.to(tl.uint8), mask=there)
        numbers = (wide * inverse[:, None]).to(place.dtype.element_ty)
    tl.store(place, numbers, mask=mask)


@triton.jit
def _finite(numbers: "Any") -> "Any":
    return tl.where(tl.abs(numbers.to(tl.float32)) < float("inf"), numbers, 0.0)


@triton.jit(do_not_specialize=_VARYING)
def decode_kernel(
    out: "Any", partial: "Any", stats: "Any", counters: "Any", query: "Any", keys: "Any", values: "Any",
    key_scales: "Any", value_scales: "Any", sinks: "Any", index: "Any", work_at: "Any", work_size: "Any",
    tables_at: "Any", token_stride: "Any", head_stride: "Any", scaling: "Any", softcap: "Any",
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, WIDEN: tl.constexpr,
    FP8: tl.constexpr, MOST_SPLITS: tl.constexpr, GROUP_WIDTH: tl.constexpr, JOINED: tl.constexpr,
) -> None:  # fmt: skip
    """Program (kv head, work item): one share of the keys that one decode sees.

    The result of a decode with one share goes to ``out`` [tokens, heads, value size]. Else the share's sum of values
    goes to ``partial`` [split items, heads, value size], its maximum (base 2) and its sum of weights to ``stats``
    [split items, heads, 2], and the program that finishes last, by ``counters`` [split items, kv heads], joins all
    shares and leaves its counter at 0. ``WINDOW`` 0 means none. A sink is a score without a value: the first share
    begins with it. ``WIDEN`` multiplies in float32 whatever the type is, for the interpreter, which takes bfloat16
    for integers.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head, number = tl.program_id(0), tl.program_id(1)
    item = index + work_at + number
    token, position = tl.load(item).to(tl.int64), tl.load(item + work_size)
    table = index + tables_at + tl.load(item + 2 * work_size)
    split, splits = tl.load(item + 3 * work_size), tl.minimum(tl.load(item + 4 * work_size), MOST_SPLITS)
    if split >= splits:
        return
    rows, k, v = tl.arange(0, ROWS), tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    valid, head = rows < GROUP, kv_head * GROUP + rows
    at = token * token_stride + head * head_stride
    q = tl.load(query + at[:, None] + k[None, :], mask=valid[:, None] & (k < KEY_SIZE)[None, :], other=0.0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:
        sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2E
        best, total = tl.where(split == 0, sink, best), tl.where(split == 0, 1.0, total)
    mixed = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    # Whole tiles of keys, from the window's first, in equal shares.
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0) // KEYS
    share = tl.cdiv(tl.cdiv(position + 1, KEYS) - first, splits)
    begin = (first + split * share) * KEYS
    best, total, mixed = _attend(
        best, total, mixed, _operand(q, WIDEN), keys, values, key_scales, value_scales, table, begin,
        tl.minimum(position + 1, begin + share * KEYS), position + tl.zeros([ROWS], tl.int32), kv_head, scaling,
        softcap, KV_HEADS, KEY_SIZE, VALUE_SIZE, BLOCK_SIZE, KEYS, WINDOW, SOFTCAP, FP8, True,
    )  # fmt: skip
    stored = valid[:, None] & (v < VALUE_SIZE)[None, :]
    if splits == 1:
        result = (mixed / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + (token * HEADS + head)[:, None] * VALUE_SIZE + v[None, :], result, mask=stored)
    else:
        place = number.to(tl.int64) * HEADS + head
        tl.store(partial + place[:, None] * VALUE_SIZE + v[None, :], mixed, mask=stored)
        tl.store(stats + place * 2, best, mask=valid)
        tl.store(stats + place * 2 + 1, total, mask=valid)
        _join_if_last(
            out, partial, stats, counters, token, number - split, splits, kv_head, HEADS, KV_HEADS, GROUP_WIDTH,
            VALUE_SIZE, VALUE_WIDTH, JOINED,
        )  # fmt: skip


@triton.jit
def _join_if_last(
    out: "Any", partial: "Any", stats: "Any", counters: "Any", token: "Any", leader: "Any", splits: "Any",
    kv_head: "Any",
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP_WIDTH: tl.constexpr, VALUE_SIZE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, JOINED: tl.constexpr,
) -> None:  # fmt: skip
    """If all other shares are there: their sums, brought to their common maximum, over the common sum of weights.

    ``leader`` is the item of the first share. ``JOINED`` shares are read at once, so that few reads wait for others.
    """
    # One thread counts, and releases what it has seen: after the barrier that is the stores of all.
    tl.debug_barrier()
    counter = counters + leader * KV_HEADS + kv_head
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == splits - 1:
        tl.store(counter, 0)  # for the next layer
        rows, v = tl.arange(0, GROUP_WIDTH), tl.arange(0, VALUE_WIDTH)
        valid, head = rows < HEADS // KV_HEADS, kv_head * (HEADS // KV_HEADS) + rows
        best = tl.full([GROUP_WIDTH], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_WIDTH], tl.float32)
        mixed = tl.zeros([GROUP_WIDTH, VALUE_WIDTH], tl.float32)
        stored = valid[:, None] & (v < VALUE_SIZE)[None, :]
        # From here on 32 bits are enough, and half as many registers hold the addresses.
        stats += leader.to(tl.int64) * HEADS * 2
        partial += leader.to(tl.int64) * HEADS * VALUE_SIZE
        for start in range(0, splits, JOINED):
            split = start + tl.arange(0, JOINED)
            there = (split < splits)[:, None] & valid[None, :]
            place = split[:, None] * HEADS + head[None, :]
            # Not through the first cache: other processors wrote these.
            highs = tl.load(stats + place * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
            totals = tl.load(stats + place * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
            mask = there[:, :, None] & (v < VALUE_SIZE)[None, None, :]
            source = partial + place[:, :, None] * VALUE_SIZE + v[None, None, :]
            sums = tl.load(source, mask=mask, other=0.0, cache_modifier=".cg")
            highest = tl.maximum(best, tl.max(highs, 0))
            fading, weights = tl.exp2(best - highest), tl.exp2(highs - highest[None, :])
            total = total * fading + tl.sum(totals * weights, 0)
            mixed = mixed * fading[:, None] + tl.sum(sums * weights[:, :, None], 0)
            best = highest
        result = (mixed / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + (token * HEADS + head)[:, None] * VALUE_SIZE + v[None, :], result, mask=stored)


@triton.jit(do_not_specialize=_VARYING)
def prefill_kernel(
    out: "Any", query: "Any", keys: "Any", values: "Any", key_scales: "Any", value_scales: "Any", sinks: "Any",
    index: "Any", num_tokens: "Any", chunks_at: "Any", chunks_size: "Any", tables_at: "Any", token_stride: "Any",
    head_stride: "Any", scaling: "Any", softcap: "Any",
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, WIDEN: tl.constexpr,
    FP8: tl.constexpr,
) -> None:  # fmt: skip
    """Program (kv head, tile): the tile's queries against all keys that they see.

    A row of a tile is one query head of one query. The last tiles of a chunk see the most keys and come first. For the
    other parameters see ``decode_kernel``.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    QUERIES: tl.constexpr = ROWS // GROUP
    kv_head, tile = tl.program_id(0), tl.program_id(1)
    rows, k, v = tl.arange(0, ROWS), tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    head = kv_head * GROUP + rows % GROUP
    first, num_chunks = index + chunks_at, tl.load(index + chunks_at)
    if tile >= num_tokens // QUERIES + num_chunks:
        return
    chunk, later, length = _find_tile(first + 1 + chunks_size, num_chunks, tile, QUERIES)
    if length == 0:
        return
    passed = (tl.cdiv(length, QUERIES) - 1 - later) * QUERIES
    count = tl.minimum(length - passed, QUERIES)
    first_token = tl.load(first + 1 + chunk) + passed
    position = tl.load(index + first_token)
    table = index + tables_at + tl.load(index + num_tokens + first_token)
    asking, token = position + rows // GROUP, (first_token + rows // GROUP).to(tl.int64)
    valid = rows // GROUP < count
    at, mask = token * token_stride + head * head_stride, valid[:, None] & (k < KEY_SIZE)[None, :]
    q = _operand(tl.load(query + at[:, None] + k[None, :], mask=mask, other=0.0), WIDEN)
    best, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    if SINKS:
        best = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2E
        total = tl.full([ROWS], 1.0, tl.float32)
    mixed = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    # The tiles of keys from ``begin`` to ``full`` are seen whole by every query: no masks there.
    end = position + count
    begin, full = 0, (position + 1) // KEYS * KEYS
    if WINDOW > 0:
        edge = tl.maximum(position - WINDOW + 1, 0) // KEYS * KEYS
        begin = tl.cdiv(tl.maximum(end - WINDOW, 0), KEYS) * KEYS
        full = tl.maximum(begin, full)
        best, total, mixed = _attend(
            best, total, mixed, q, keys, values, key_scales, value_scales, table, edge, tl.minimum(begin, end), asking,
            kv_head, scaling, softcap, KV_HEADS, KEY_SIZE, VALUE_SIZE, BLOCK_SIZE, KEYS, WINDOW, SOFTCAP, FP8, True,
        )  # fmt: skip
    best, total, mixed = _attend(
        best, total, mixed, q, keys, values, key_scales, value_scales, table, begin, full, asking, kv_head, scaling,
        softcap, KV_HEADS, KEY_SIZE, VALUE_SIZE, BLOCK_SIZE, KEYS, WINDOW, SOFTCAP, FP8, False,
    )  # fmt: skip
    best, total, mixed = _attend(
        best, total, mixed, q, keys, values, key_scales, value_scales, table, full, end, asking, kv_head, scaling,
        softcap, KV_HEADS, KEY_SIZE, VALUE_SIZE, BLOCK_SIZE, KEYS, WINDOW, SOFTCAP, FP8, True,
    )  # fmt: skip
    result, stored = (mixed / total[:, None]).to(out.dtype.element_ty), valid[:, None] & (v < VALUE_SIZE)[None, :]
    tl.store(out + (token * HEADS + head)[:, None] * VALUE_SIZE + v[None, :], result, mask=stored)


@triton.jit
def _find_tile(lengths: "Any", num_chunks: "Any", tile: "Any", QUERIES: tl.constexpr) -> "Any":
    """The chunk that a tile is of, the tile's number in it, and the chunk's length: 0 beyond the last tile."""
    chunk, before, passed = 0, 0, 0
    for start in range(0, num_chunks, _CHUNKS):
        places = start + tl.arange(0, _CHUNKS)
        tiles = tl.cdiv(tl.load(lengths + places, mask=places < num_chunks, other=0), QUERIES)
        ends = passed + tl.cumsum(tiles, 0)
        chunk += tl.sum((ends <= tile).to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(ends <= tile, ends, 0), 0))
        passed += tl.sum(tiles, 0)
    return chunk, tile - before, tl.load(lengths + chunk, mask=tile < passed, other=0)


@triton.jit
def _operand(numbers: "Any", WIDEN: tl.constexpr) -> "Any":
    if WIDEN:
        numbers = numbers.to(tl.float32)
    return numbers


@triton.jit
def _attend(
    best: "Any", total: "Any", mixed: "Any", q: "Any", keys: "Any", values: "Any", key_scales: "Any",
    value_scales: "Any", table: "Any", begin: "Any", end: "Any", asking: "Any", kv_head: "Any", scaling: "Any",
    softcap: "Any",
    KV_HEADS: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FP8: tl.constexpr, MASKED: tl.constexpr,
) -> "Any":  # fmt: skip
    """Take the keys [begin, end) into the running maximum, sum of weights and weighted sum of values of each row.

    ``asking`` are the positions of the rows. Without ``MASKED`` every row sees all of these keys, whole tiles of them.
    ``FP8`` keys and values are multiplied without their scales: those of keys go into the scores, those of values into
    the weights, both exactly, because they are powers of two.
    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, as arranged by Dao, "FlashAttention-2:
    faster attention with better parallelism and work partitioning", 2023.
    """
    k, v = tl.arange(0, q.shape[1]), tl.arange(0, mixed.shape[1])
    # Scores become powers of two where the maximum is taken away: one fused operation for both.
    unit = LOG2E if SOFTCAP else scaling * LOG2E
    for start in range(begin, end, KEYS):
        asked = start + tl.arange(0, KEYS)
        inside = asked < end
        if MASKED:
            block = tl.load(table + asked // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        else:
            block = tl.load(table + asked // BLOCK_SIZE).to(tl.int64)
        page = (block * BLOCK_SIZE + asked % BLOCK_SIZE) * KV_HEADS + kv_head
        source = keys + page[None, :] * KEY_SIZE + k[:, None]
        key = _load(source, inside[None, :], (k < KEY_SIZE)[:, None], MASKED, q.shape[1] > KEY_SIZE)
        scores = tl.dot(q, key.to(q.dtype), input_precision="ieee")
        if FP8:
            scores *= _scales(key_scales + page, inside, MASKED)[None, :]
        if SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), which goes to 1 and -1 where the exponential leaves its range.
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * (scores * scaling) / softcap) + 1.0))
        if MASKED:
            seen = inside[None, :] & (asked[None, :] <= asking[:, None])
            if WINDOW > 0:
                seen = seen & (asked[None, :] > asking[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(best, tl.max(scores, 1) * unit)
        base = highest
        if MASKED:
            # Where nothing was seen so far, minus infinity from itself would be NaN.
            base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores * unit - base[:, None])
        fading = tl.exp2(best - base)
        total = total * fading + tl.sum(weights, 1)
        source = values + page[:, None] * VALUE_SIZE + v[None, :]
        value = _load(source, inside[:, None], (v < VALUE_SIZE)[None, :], MASKED, mixed.shape[1] > VALUE_SIZE)
        if FP8:
            weights *= _scales(value_scales + page, inside, MASKED)[None, :]
        # The range of float16 would be too small for weights times scales.
        value = value.to(tl.bfloat16 if FP8 and q.dtype == tl.float16 else q.dtype)
        mixed = mixed * fading[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        best = highest
    return best, total, mixed


@triton.jit
def _load(source: "Any", inside: "Any", real: "Any", MASKED: tl.constexpr, WIDENED: tl.constexpr) -> "Any":
    """A tile of keys or values, 0 where it is not ``inside`` of the sequence or, in ``WIDENED`` tiles, not ``real``."""
    if MASKED:
        numbers = tl.load(source, mask=inside & real, other=0.0)
    elif WIDENED:
        numbers = tl.load(source, mask=real, other=0.0)
    else:
        numbers = tl.load(source)
    return numbers


@triton.jit
def _scales(source: "Any", inside: "Any", MASKED: tl.constexpr) -> "Any":
    """The powers of two of a tile's keys or values; where it is not ``inside`` of the sequence, 0."""
    powers = tl.load(source, mask=inside, other=0) if MASKED else tl.load(source)
    return (powers.to(tl.int32) << 23).to(tl.float32, bitcast=True)

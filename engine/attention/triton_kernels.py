"""The kernels of the paged attention in Triton: attend from decodes, attend from chunks.

No ``from __future__ import annotations`` here: Triton's interpreter looks at the annotations themselves.

What a step is lies in one array of int32, ``index``, whose parts ``engine.attention.step_index`` describes. All query
heads of one key-value head share a program, which reads their keys and values once. Programs without a part in the step
return at once, so that one recorded grid fits all steps of a shape.
"""

from typing import Any

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Numbers that differ from step to step are not specialised: a kernel made anew for one that happens to be 1 or a
# multiple of 16 would stop a running server for a second. Strides are: known multiples of 16 make loads 16 bytes wide.
VARYING = ("num_tokens", "work_at", "work_size", "chunks_at", "chunks_size", "tables_at")
# How many lengths of chunks are looked at together; a step seldom has more.
_CHUNKS = tl.constexpr(512)


@triton.jit(do_not_specialize=VARYING)
def decode_kernel(
    out: "Any", partial: "Any", stats: "Any", counters: "Any", query: "Any", keys: "Any", values: "Any",
    key_scales: "Any", value_scales: "Any", sinks: "Any", index: "Any", work_at: "Any", work_size: "Any",
    tables_at: "Any", token_stride: "Any", head_stride: "Any", scaling: "Any", softcap: "Any",
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, WIDEN: tl.constexpr,
    FP8: tl.constexpr, LATENT: tl.constexpr, SPAN: tl.constexpr, MOST_SPLITS: tl.constexpr,
    JOINED_HEADS: tl.constexpr, JOINED: tl.constexpr,
) -> None:  # fmt: skip
    """Program (part of a kv head's query heads, work item): one share of the keys that one decode sees.

    A part is ``SPAN`` heads, no more than a tile has ``ROWS``. ``LATENT`` keys hold their values (``write_kernel``).
    The result of a decode with one share goes to ``out`` [tokens, heads, value size]. Else the share's sum of values
    goes to ``partial`` [split items, heads, value size], its maximum (base 2) and its sum of weights to ``stats``
    [split items, heads, 2], and the program that finishes last, by ``counters`` [split items, kv heads], joins all
    shares and leaves its counter at 0. ``WINDOW`` 0 means none, and one below 0 chunks of as many tokens. ``WIDEN``
    multiplies in float32 whatever the type is, for the interpreter, which takes bfloat16 for integers.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    PARTS: tl.constexpr = (GROUP + SPAN - 1) // SPAN
    part, number = tl.program_id(0), tl.program_id(1)
    kv_head, passed = part // PARTS, part % PARTS * SPAN
    item = index + work_at + number
    token, position = tl.load(item).to(tl.int64), tl.load(item + work_size)
    table = index + tables_at + tl.load(item + 2 * work_size)
    split, splits = tl.load(item + 3 * work_size), tl.minimum(tl.load(item + 4 * work_size), MOST_SPLITS)
    if split >= splits:
        return
    rows, v = tl.arange(0, ROWS), tl.arange(0, VALUE_WIDTH)
    valid, head = rows < tl.minimum(SPAN, GROUP - passed), kv_head * GROUP + passed + rows
    source = query + token * token_stride + head * head_stride
    q, rest = _queries(source, valid, KEY_SIZE, VALUE_SIZE, KEY_WIDTH, VALUE_WIDTH, LATENT, WIDEN)
    leads = split + tl.zeros([ROWS], tl.int32) == 0
    best, total, mixed = _nothing_yet(sinks, head, valid & leads, VALUE_WIDTH, SINKS)
    # Whole tiles of keys, from the window's first, in equal shares.
    first = 0
    if WINDOW != 0:
        first = _first_seen(position, WINDOW) // KEYS
    share = tl.cdiv(tl.cdiv(position + 1, KEYS) - first, splits)
    begin = (first + split * share) * KEYS
    best, total, mixed = _attend(
        best, total, mixed, q, rest, keys, values, key_scales, value_scales, table, begin,
        tl.minimum(position + 1, begin + share * KEYS), position + tl.zeros([ROWS], tl.int32), kv_head, scaling,
        softcap, KV_HEADS, KEY_SIZE, VALUE_SIZE, BLOCK_SIZE, KEYS, WINDOW, SOFTCAP, FP8, LATENT, True,
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
            out, partial, stats, counters, token, number - split, splits, part, kv_head * GROUP + passed,
            tl.minimum(SPAN, GROUP - passed), HEADS, KV_HEADS * PARTS, SPAN, JOINED_HEADS, VALUE_SIZE, VALUE_WIDTH,
            JOINED,
        )  # fmt: skip


@triton.jit
def _join_if_last(
    out: "Any", partial: "Any", stats: "Any", counters: "Any", token: "Any", leader: "Any", splits: "Any",
    part: "Any", first_head: "Any", count: "Any",
    HEADS: tl.constexpr, ALL_PARTS: tl.constexpr, SPAN: tl.constexpr, JOINED_HEADS: tl.constexpr,
    VALUE_SIZE: tl.constexpr, VALUE_WIDTH: tl.constexpr, JOINED: tl.constexpr,
) -> None:  # fmt: skip
    """If all other shares are there: their sums, brought to their common maximum, over the common sum of weights.

    ``leader`` is the item of the first share. The ``part`` of ``ALL_PARTS`` has ``count`` heads, ``SPAN`` at most, from
    ``first_head`` on; ``JOINED_HEADS`` are joined together, and ``JOINED`` shares read at once, so that few reads wait
    for others.
    """
    # One thread counts, and releases what it has seen: after the barrier that is the stores of all.
    tl.debug_barrier()
    counter = counters + leader * ALL_PARTS + part
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == splits - 1:
        tl.store(counter, 0)  # for the next layer
        # From here on 32 bits are enough, and half as many registers hold the addresses.
        stats += leader.to(tl.int64) * HEADS * 2
        partial += leader.to(tl.int64) * HEADS * VALUE_SIZE
        for passed in range(0, SPAN, JOINED_HEADS):
            rows, v = passed + tl.arange(0, JOINED_HEADS), tl.arange(0, VALUE_WIDTH)
            valid, head = rows < count, first_head + rows
            best = tl.full([JOINED_HEADS], float("-inf"), tl.float32)
            total = tl.zeros([JOINED_HEADS], tl.float32)
            mixed = tl.zeros([JOINED_HEADS, VALUE_WIDTH], tl.float32)
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
            stored = valid[:, None] & (v < VALUE_SIZE)[None, :]
            tl.store(out + (token * HEADS + head)[:, None] * VALUE_SIZE + v[None, :], result, mask=stored)


@triton.jit(do_not_specialize=VARYING)
def prefill_kernel(
    out: "Any", query: "Any", keys: "Any", values: "Any", key_scales: "Any", value_scales: "Any", sinks: "Any",
    index: "Any", num_tokens: "Any", chunks_at: "Any", chunks_size: "Any", tables_at: "Any", token_stride: "Any",
    head_stride: "Any", scaling: "Any", softcap: "Any",
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, WIDEN: tl.constexpr,
    FP8: tl.constexpr, LATENT: tl.constexpr, SPAN: tl.constexpr,
) -> None:  # fmt: skip
    """Program (part of a kv head's query heads, tile): the tile's queries against all keys that they see.

    A row of a tile is one query head of one query. The last tiles of a chunk see the most keys and come first. For the
    other parameters see ``decode_kernel``.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    QUERIES: tl.constexpr = ROWS // SPAN
    PARTS: tl.constexpr = (GROUP + SPAN - 1) // SPAN
    part, tile = tl.program_id(0), tl.program_id(1)
    kv_head = part // PARTS
    rows, v = tl.arange(0, ROWS), tl.arange(0, VALUE_WIDTH)
    in_group = part % PARTS * SPAN + rows % SPAN
    head = kv_head * GROUP + in_group
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
    asking, token = position + rows // SPAN, (first_token + rows // SPAN).to(tl.int64)
    valid = (rows // SPAN < count) & (in_group < GROUP)
    source = query + token * token_stride + head * head_stride
    q, rest = _queries(source, valid, KEY_SIZE, VALUE_SIZE, KEY_WIDTH, VALUE_WIDTH, LATENT, WIDEN)
    best, total, mixed = _nothing_yet(sinks, head, valid, VALUE_WIDTH, SINKS)
    # The tiles of keys from ``begin`` to ``full`` are seen whole by every query: no masks there.
    end = position + count
    begin, full = 0, (position + 1) // KEYS * KEYS
    if WINDOW != 0:
        edge = _first_seen(position, WINDOW) // KEYS * KEYS
        begin = tl.cdiv(_first_seen(end - 1, WINDOW), KEYS) * KEYS
        full = tl.maximum(begin, full)
        best, total, mixed = _attend(
            best, total, mixed, q, rest, keys, values, key_scales, value_scales, table, edge, tl.minimum(begin, end),
            asking, kv_head, scaling, softcap, KV_HEADS, KEY_SIZE, VALUE_SIZE, BLOCK_SIZE, KEYS, WINDOW, SOFTCAP, FP8,
            LATENT, True,
        )  # fmt: skip
    best, total, mixed = _attend(
        best, total, mixed, q, rest, keys, values, key_scales, value_scales, table, begin, full, asking, kv_head,
        scaling, softcap, KV_HEADS, KEY_SIZE, VALUE_SIZE, BLOCK_SIZE, KEYS, WINDOW, SOFTCAP, FP8, LATENT, False,
    )  # fmt: skip
    best, total, mixed = _attend(
        best, total, mixed, q, rest, keys, values, key_scales, value_scales, table, full, end, asking, kv_head, scaling,
        softcap, KV_HEADS, KEY_SIZE, VALUE_SIZE, BLOCK_SIZE, KEYS, WINDOW, SOFTCAP, FP8, LATENT, True,
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
def _queries(
    source: "Any", valid: "Any", KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, LATENT: tl.constexpr, WIDEN: tl.constexpr,
) -> "Any":  # fmt: skip
    """Rows of queries, 0 where they are not ``valid``. Of ``LATENT`` layers in two parts: what meets the values, and
    what meets the other numbers of keys."""
    k, v = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    if LATENT:
        place = source[:, None] + VALUE_SIZE + k[None, :]
        rest = tl.load(place, mask=valid[:, None] & (k < KEY_SIZE - VALUE_SIZE)[None, :], other=0.0)
        q = tl.load(source[:, None] + v[None, :], mask=valid[:, None] & (v < VALUE_SIZE)[None, :], other=0.0)
    else:
        q = tl.load(source[:, None] + k[None, :], mask=valid[:, None] & (k < KEY_SIZE)[None, :], other=0.0)
        rest = q
    return _operand(q, WIDEN), _operand(rest, WIDEN)


@triton.jit
def _nothing_yet(
    sinks: "Any", head: "Any", first: "Any", VALUE_WIDTH: tl.constexpr, SINKS: tl.constexpr
) -> "Any":  # fmt: skip
    """The maximum, the sum of weights and the weighted sum of values of rows before any key; a sink is a score without
    a value, which the ``first`` program of a row begins with."""
    best = tl.full([head.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([head.shape[0]], tl.float32)
    if SINKS:
        sink = tl.load(sinks + head, mask=first, other=0.0).to(tl.float32) * LOG2E
        best, total = tl.where(first, sink, best), tl.where(first, 1.0, total)
    return best, total, tl.zeros([head.shape[0], VALUE_WIDTH], tl.float32)


@triton.jit
def _operand(numbers: "Any", WIDEN: tl.constexpr) -> "Any":
    if WIDEN:
        numbers = numbers.to(tl.float32)
    return numbers


@triton.jit
def _attend(
    best: "Any", total: "Any", mixed: "Any", q: "Any", rest: "Any", keys: "Any", values: "Any", key_scales: "Any",
    value_scales: "Any", table: "Any", begin: "Any", end: "Any", asking: "Any", kv_head: "Any", scaling: "Any",
    softcap: "Any",
    KV_HEADS: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FP8: tl.constexpr, LATENT: tl.constexpr,
    MASKED: tl.constexpr,
) -> "Any":  # fmt: skip
    """Take the keys [begin, end) into the running maximum, sum of weights and weighted sum of values of each row.

    ``asking`` are the positions of the rows. Without ``MASKED`` every row sees all of these keys, whole tiles of them.
    ``FP8`` keys and values are multiplied without their scales: those of keys go into the scores, those of values into
    the weights, both exactly, because they are powers of two.
    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, as arranged by Dao, "FlashAttention-2:
    faster attention with better parallelism and work partitioning", 2023.
    """
    k, v = tl.arange(0, q.shape[1]), tl.arange(0, mixed.shape[1])
    # The range of float16 would be too small for weights times scales.
    mixing: tl.constexpr = tl.bfloat16 if FP8 and q.dtype == tl.float16 else q.dtype
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
        if LATENT:
            source = keys + page[:, None] * KEY_SIZE
            value, scores = _score_latents(q, rest, source, inside, KEY_SIZE, VALUE_SIZE, MASKED)
        else:
            source = keys + page[None, :] * KEY_SIZE + k[:, None]
            key = _load(source, inside[None, :], (k < KEY_SIZE)[:, None], MASKED, q.shape[1] > KEY_SIZE)
            scores = tl.dot(q, key.to(q.dtype), input_precision="ieee")
        if FP8:
            scores *= _scales(key_scales + page, inside, MASKED)[None, :]
        if SOFTCAP:
            scores = _capped(scores * scaling, softcap)
        if MASKED:
            scores = tl.where(_seen(asked, inside, asking, WINDOW), scores, float("-inf"))
        highest = tl.maximum(best, tl.max(scores, 1) * unit)
        base = highest
        if MASKED:
            # Where nothing was seen so far, minus infinity from itself would be NaN.
            base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores * unit - base[:, None])
        fading = tl.exp2(best - base)
        total = total * fading + tl.sum(weights, 1)
        if not LATENT:
            source = values + page[:, None] * VALUE_SIZE + v[None, :]
            value = _load(source, inside[:, None], (v < VALUE_SIZE)[None, :], MASKED, mixed.shape[1] > VALUE_SIZE)
        if FP8:
            weights *= _scales(value_scales + page, inside, MASKED)[None, :]
        mixed = mixed * fading[:, None] + tl.dot(weights.to(mixing), value.to(mixing), input_precision="ieee")
        best = highest
    return best, total, mixed


@triton.jit
def _score_latents(
    q: "Any", rest: "Any", source: "Any", inside: "Any",
    KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, MASKED: tl.constexpr,
) -> "Any":  # fmt: skip
    """A tile of latents, which are values, and the scores of their whole keys: one read serves both products."""
    v, k = tl.arange(0, q.shape[1]), tl.arange(0, rest.shape[1])
    value = _load(source + v[None, :], inside[:, None], (v < VALUE_SIZE)[None, :], MASKED, q.shape[1] > VALUE_SIZE)
    rotated = _load(
        source + VALUE_SIZE + k[None, :], inside[:, None], (k < KEY_SIZE - VALUE_SIZE)[None, :], MASKED,
        rest.shape[1] > KEY_SIZE - VALUE_SIZE,
    )  # fmt: skip
    scores = tl.dot(q, tl.trans(value.to(q.dtype)), input_precision="ieee")
    return value, tl.dot(rest, tl.trans(rotated.to(q.dtype)), scores, input_precision="ieee")


@triton.jit
def _capped(scores: "Any", softcap: "Any") -> "Any":
    """tanh(x) = 1 - 2 / (exp(2 x) + 1), which goes to 1 and -1 where the exponential leaves its range."""
    return softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))


@triton.jit
def _seen(asked: "Any", inside: "Any", asking: "Any", WINDOW: tl.constexpr) -> "Any":
    """Which of the keys at ``asked`` the rows at ``asking`` see."""
    seen = inside[None, :] & (asked[None, :] <= asking[:, None])
    if WINDOW != 0:
        seen = seen & (asked[None, :] >= _first_seen(asking, WINDOW)[:, None])
    return seen


@triton.jit
def _first_seen(position: "Any", WINDOW: tl.constexpr) -> "Any":
    """``engine.api.block_groups.Window.first_seen``."""
    return position // -WINDOW * -WINDOW if WINDOW < 0 else tl.maximum(position - WINDOW + 1, 0)


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

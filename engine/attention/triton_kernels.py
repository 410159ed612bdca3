"""The kernels of the paged attention in Triton: write keys and values, attend to tiles of queries, join splits.

No ``from __future__ import annotations`` here: Triton's interpreter looks at the annotations themselves.

What a step computes is told by one array of int32, ``index``: the slots of its tokens from the beginning, then tiles,
then block tables. A tile is four numbers: the row of its first query in the batch, that query's position in its
sequence, the number of queries, and where in ``index`` the sequence's block table begins. A decode is a tile with one
query. All query heads of one key-value head share a program, which reads their keys and values once.
"""

from typing import Any

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Numbers that differ from step to step are not specialised: a kernel made anew for one that happens to be 1 or a
# multiple of 16 would stop a running server for a second. Strides are: known multiples of 16 make loads 16 bytes wide.
_VARYING = ("tiles_at", "num_splits")


@triton.jit
def write_kernel(
    index: "Any",
    keys: "Any",
    values: "Any",
    new_keys: "Any",
    new_values: "Any",
    token_stride: "Any",
    head_stride: "Any",
    value_token_stride: "Any",
    value_head_stride: "Any",
    KV_HEADS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
) -> None:
    """Program (token, kv head): one key and one value into the token's slot; what is not finite becomes 0.

    Blocks are [slots, kv heads, size]. See ``ReferenceAttention.write_kv`` for why nothing else may enter a block.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    page = tl.load(index + token).to(tl.int64) * KV_HEADS + head
    k, v = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    key = tl.load(new_keys + token * token_stride + head * head_stride + k, mask=k < KEY_SIZE, other=0.0)
    key = tl.where(tl.abs(key.to(tl.float32)) < float("inf"), key, 0.0)
    tl.store(keys + page * KEY_SIZE + k, key, mask=k < KEY_SIZE)
    at = token * value_token_stride + head * value_head_stride
    value = tl.load(new_values + at + v, mask=v < VALUE_SIZE, other=0.0)
    value = tl.where(tl.abs(value.to(tl.float32)) < float("inf"), value, 0.0)
    tl.store(values + page * VALUE_SIZE + v, value, mask=v < VALUE_SIZE)


@triton.jit(do_not_specialize=_VARYING)
def attend_kernel(
    out: "Any", partial: "Any", stats: "Any", query: "Any", keys: "Any", values: "Any", sinks: "Any", index: "Any",
    tiles_at: "Any", token_stride: "Any", head_stride: "Any", scaling: "Any", softcap: "Any",
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:  # fmt: skip
    """Program (tile, kv head, split): the tile's queries against one share of the keys that they see.

    A row of the tile is one query head of one query. With ``SPLIT`` the share's sum of values goes to ``partial``
    [tiles, heads, splits, value size] and its maximum (base 2) and sum of weights to ``stats`` [tiles, heads, splits,
    2], else the result to ``out`` [tokens, heads, value size]. ``WINDOW`` 0 means none. A sink is a score without a
    value: the first split begins with it. ``WIDEN`` multiplies in float32 whatever the type is, for the interpreter,
    which takes bfloat16 for integers.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head, split, num_splits = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    tile = index + tiles_at + tl.program_id(0) * 4
    first_row, position, count, table_at = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    rows, k, v = tl.arange(0, ROWS), tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    asking, head = position + rows // GROUP, kv_head * GROUP + rows % GROUP
    valid = rows // GROUP < count
    token = (first_row + rows // GROUP).to(tl.int64)
    at = token * token_stride + head * head_stride
    q = tl.load(query + at[:, None] + k[None, :], mask=valid[:, None] & (k < KEY_SIZE)[None, :], other=0.0)
    q = _operand(q, WIDEN)
    begin, end = _share(position, count, split, num_splits, KEYS, WINDOW)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:
        sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2E
        best = tl.where(split == 0, sink, best)
        total = tl.where(split == 0, 1.0, total)
    mixed = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    for start in range(begin, end, KEYS):
        asked = start + tl.arange(0, KEYS)
        inside = asked < end
        block = tl.load(index + table_at + asked // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        page = (block * BLOCK_SIZE + asked % BLOCK_SIZE) * KV_HEADS + kv_head
        mask = inside[None, :] & (k < KEY_SIZE)[:, None]
        key = _operand(tl.load(keys + page[None, :] * KEY_SIZE + k[:, None], mask=mask, other=0.0), WIDEN)
        scores = _scores(q, key, asking, asked, inside, scaling, softcap, WINDOW, SOFTCAP)
        mask = inside[:, None] & (v < VALUE_SIZE)[None, :]
        value = _operand(tl.load(values + page[:, None] * VALUE_SIZE + v[None, :], mask=mask, other=0.0), WIDEN)
        best, total, mixed = _fold(best, total, mixed, scores, value)
    stored = valid[:, None] & (v < VALUE_SIZE)[None, :]
    if SPLIT:
        place = (tl.program_id(0).to(tl.int64) * HEADS + head) * num_splits + split
        tl.store(partial + place[:, None] * VALUE_SIZE + v[None, :], mixed, mask=stored)
        tl.store(stats + place * 2, best, mask=valid)
        tl.store(stats + place * 2 + 1, total, mask=valid)
    else:
        place = token * HEADS + head
        result = (mixed / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + place[:, None] * VALUE_SIZE + v[None, :], result, mask=stored)


@triton.jit
def _operand(numbers: "Any", WIDEN: tl.constexpr) -> "Any":
    if WIDEN:
        numbers = numbers.to(tl.float32)
    return numbers


@triton.jit
def _share(
    position: "Any", count: "Any", split: "Any", num_splits: "Any", KEYS: tl.constexpr, WINDOW: tl.constexpr
) -> "Any":
    """The keys [begin, end) of a split: the tiles of keys from the window's first to the last query's own, shared."""
    end = position + count
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0) // KEYS
    share = tl.cdiv(tl.cdiv(end, KEYS) - first, num_splits)
    begin = (first + split * share) * KEYS
    return begin, tl.minimum(end, begin + share * KEYS)


@triton.jit
def _scores(
    q: "Any", key: "Any", asking: "Any", asked: "Any", inside: "Any", scaling: "Any", softcap: "Any",
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
) -> "Any":  # fmt: skip
    """Scores for powers of two, minus infinity where the query at ``asking`` does not see the key at ``asked``."""
    scores = tl.dot(q, key, input_precision="ieee") * scaling
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which goes to 1 and -1 where the exponential leaves its range.
        scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
    seen = inside[None, :] & (asked[None, :] <= asking[:, None])
    if WINDOW > 0:
        seen = seen & (asked[None, :] > asking[:, None] - WINDOW)
    return tl.where(seen, scores * LOG2E, float("-inf"))


@triton.jit
def _fold(best: "Any", total: "Any", mixed: "Any", scores: "Any", value: "Any") -> "Any":
    """Take more keys into the running maximum, sum of weights and weighted sum of values of each row.

    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, as arranged by Dao, "FlashAttention-2:
    faster attention with better parallelism and work partitioning", 2023.
    """
    highest = tl.maximum(best, tl.max(scores, 1))
    # Where nothing was seen so far, minus infinity from itself would be NaN.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - base[:, None])
    fading = tl.exp2(best - base)
    mixed = mixed * fading[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return highest, total * fading + tl.sum(weights, 1), mixed


@triton.jit(do_not_specialize=_VARYING)
def join_kernel(
    out: "Any",
    partial: "Any",
    stats: "Any",
    index: "Any",
    tiles_at: "Any",
    num_splits: "Any",
    HEADS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
) -> None:
    """Program (decode, head): the splits' sums, brought to their common maximum, over the common sum of weights."""
    head = tl.program_id(1)
    place = (tl.program_id(0).to(tl.int64) * HEADS + head) * num_splits
    splits, v = tl.arange(0, MAX_SPLITS), tl.arange(0, VALUE_WIDTH)
    there = splits < num_splits
    best = tl.load(stats + (place + splits) * 2, mask=there, other=float("-inf"))
    total = tl.load(stats + (place + splits) * 2 + 1, mask=there, other=0.0)
    weights = tl.exp2(best - tl.max(best, 0))
    mask = there[:, None] & (v < VALUE_SIZE)[None, :]
    mixed = tl.load(partial + (place + splits)[:, None] * VALUE_SIZE + v[None, :], mask=mask, other=0.0)
    result = tl.sum(mixed * weights[:, None], 0) / tl.sum(total * weights, 0)
    row = tl.load(index + tiles_at + tl.program_id(0) * 4).to(tl.int64)
    tl.store(out + (row * HEADS + head) * VALUE_SIZE + v, result.to(out.dtype.element_ty), mask=v < VALUE_SIZE)

"""Triton kernels of recurrent layers: short convolutions, and one token of a recurrence, in the slots of the states.

No ``from __future__ import annotations`` here: Triton's interpreter looks at the annotations themselves.

Each number of a state is read and written by one program, so nothing has to be gathered or copied back. Rows that only
pad a recorded step share a slot that no sequence owns; what they leave there is of no matter.
"""

from typing import Any

import triton
import triton.language as tl

# As in engine/attention/triton_kernels.py: what changes from step to step compiles no new kernel.
VARYING = ("num_tokens",)
_L2_EPSILON = tl.constexpr(1e-6)


@triton.jit
def convolve_decodes_kernel(
    out: "Any", x: "Any", weight: "Any", bias: "Any", states: "Any", slots: "Any", x_stride: "Any", slot_stride: "Any",
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr, SILU: tl.constexpr,
) -> None:  # fmt: skip
    """Program (row, block of channels): one token of a sequence, whose state moves on by it.

    x [rows, CHANNELS], weight [TAPS, CHANNELS], bias [CHANNELS], states [slots, TAPS - 1, CHANNELS]; out as x.
    """
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    place = states + tl.load(slots + row).to(tl.int64) * slot_stride + channel
    newest = tl.load(x + row * x_stride + channel, mask=inside, other=0.0)
    last = weight + (TAPS - 1) * CHANNELS + channel
    sums = newest.to(tl.float32) * tl.load(last, mask=inside, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        past = tl.load(place + tap * CHANNELS, mask=inside, other=0.0)
        factor = tl.load(weight + tap * CHANNELS + channel, mask=inside, other=0.0)
        sums += past.to(tl.float32) * factor.to(tl.float32)
        if tap > 0:
            tl.store(place + (tap - 1) * CHANNELS, past, mask=inside)
    tl.store(place + (TAPS - 2) * CHANNELS, newest.to(states.dtype.element_ty), mask=inside)
    if BIASED:
        sums += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * CHANNELS + channel, _activated(sums, SILU, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def convolve_kernel(
    out: "Any", x: "Any", weight: "Any", bias: "Any", states: "Any", firsts: "Any", slots: "Any", num_tokens: "Any",
    x_stride: "Any", slot_stride: "Any",
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr,
    SILU: tl.constexpr,
) -> None:  # fmt: skip
    """Program (TOKENS tokens, block of channels) of a step of chunks; states stay as they are.

    The token ``t`` belongs to a chunk that begins with token ``firsts[t]`` and continues the state in ``slots[t]``. For
    the others see ``convolve_decodes_kernel``.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, there = channel < CHANNELS, token < num_tokens
    first = tl.load(firsts + token, mask=there, other=0).to(tl.int64)
    state = tl.load(slots + token, mask=there, other=0).to(tl.int64) * slot_stride
    sums = tl.zeros([TOKENS, BLOCK], tl.float32)
    for tap in tl.static_range(TAPS):
        source = token - (TAPS - 1 - tap)
        own = (there & (source >= first))[:, None] & inside[None, :]
        passed = (there & (source < first))[:, None] & inside[None, :]
        past = state + (source - first + TAPS - 1) * CHANNELS
        new = tl.load(x + (source * x_stride)[:, None] + channel[None, :], mask=own, other=0.0)
        old = tl.load(states + past[:, None] + channel[None, :], mask=passed, other=0.0)
        factor = tl.load(weight + tap * CHANNELS + channel, mask=inside, other=0.0)
        sums += (new.to(tl.float32) + old.to(tl.float32)) * factor.to(tl.float32)[None, :]
    if BIASED:
        sums += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    stored = there[:, None] & inside[None, :]
    result = _activated(sums, SILU, out.dtype.element_ty)
    tl.store(out + (token * CHANNELS)[:, None] + channel[None, :], result, mask=stored)


@triton.jit
def keep_convolved_kernel(
    x: "Any", states: "Any", starts: "Any", lengths: "Any", slots: "Any", x_stride: "Any", slot_stride: "Any",
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Program (chunk, block of channels): the state after a chunk, its last TAPS - 1 tokens with those before it.

    It comes after ``convolve_kernel``. A chunk is the tokens ``starts`` … ``starts + lengths - 1`` of x.
    """
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    start, length = tl.load(starts + chunk).to(tl.int64), tl.load(lengths + chunk).to(tl.int64)
    place = states + tl.load(slots + chunk).to(tl.int64) * slot_stride + channel
    for tap in tl.static_range(TAPS - 1):
        source = length - (TAPS - 1 - tap) + tl.zeros([BLOCK], tl.int64)
        new = tl.load(x + (start + source) * x_stride + channel, mask=inside & (source >= 0), other=0.0)
        # Of a token that was kept later, so nothing has been written there yet.
        old = tl.load(place + (source + TAPS - 1) * CHANNELS, mask=inside & (source < 0), other=0.0)
        kept = tl.where(source >= 0, new.to(states.dtype.element_ty), old)
        tl.store(place + tap * CHANNELS, kept, mask=inside)


@triton.jit
def delta_kernel(
    out: "Any", query: "Any", key: "Any", value: "Any", beta: "Any", gate: "Any", states: "Any", rows: "Any",
    slots: "Any", query_stride: "Any", key_stride: "Any", value_stride: "Any", slot_stride: "Any", scaling: "Any",
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY_SIZE: tl.constexpr, KEY_WIDTH: tl.constexpr,
    VALUE_SIZE: tl.constexpr, BLOCK: tl.constexpr, NORMED: tl.constexpr, BY_CHANNEL: tl.constexpr,
    PICKED: tl.constexpr,
) -> None:  # fmt: skip
    """Program (decode, head, block of the value): one token of a gated delta rule, as ``recurrences.advance`` does.

    query, key [tokens, KEY_HEADS, KEY_SIZE], which get their norm if NORMED; value and out [tokens, HEADS, VALUE_SIZE];
    beta [tokens, HEADS]; gate, the logarithm of the decay, [tokens, HEADS], BY_CHANNEL [tokens, HEADS, KEY_SIZE];
    states [slots, HEADS, KEY_SIZE, VALUE_SIZE]. The decode ``i`` is row ``rows[i]`` if PICKED, else row ``i``.
    """
    number, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows + number).to(tl.int64) if PICKED else number
    k, v = tl.arange(0, KEY_WIDTH), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    in_key, in_value = k < KEY_SIZE, v < VALUE_SIZE
    at = head // (HEADS // KEY_HEADS) * KEY_SIZE + k
    q = tl.load(query + row * query_stride + at, mask=in_key, other=0.0).to(tl.float32)
    key_now = tl.load(key + row * key_stride + at, mask=in_key, other=0.0).to(tl.float32)
    if NORMED:
        q = q * (1.0 / tl.sqrt(tl.sum(q * q, 0) + _L2_EPSILON))
        key_now = key_now * (1.0 / tl.sqrt(tl.sum(key_now * key_now, 0) + _L2_EPSILON))
    token = row * HEADS + head
    mask = in_key[:, None] & in_value[None, :]
    place = states + tl.load(slots + number).to(tl.int64) * slot_stride + head * KEY_SIZE * VALUE_SIZE
    place = place + k[:, None] * VALUE_SIZE + v[None, :]
    state = tl.load(place, mask=mask, other=0.0)
    if BY_CHANNEL:
        decay = tl.exp(tl.load(gate + token * KEY_SIZE + k, mask=in_key, other=0.0).to(tl.float32))
        state = state * decay[:, None]
    else:
        state = state * tl.exp(tl.load(gate + token).to(tl.float32))
    known = tl.sum(state * key_now[:, None], 0)
    wanted = tl.load(value + row * value_stride + head * VALUE_SIZE + v, mask=in_value, other=0.0).to(tl.float32)
    missing = (wanted - known) * tl.load(beta + token).to(tl.float32)
    state = state + key_now[:, None] * missing[None, :]
    tl.store(place, state, mask=mask)
    found = tl.sum(state * (q * scaling)[:, None], 0)
    tl.store(out + token * VALUE_SIZE + v, found.to(out.dtype.element_ty), mask=in_value)


@triton.jit
def mamba2_kernel(
    out: "Any", x: "Any", dt: "Any", log_decay: "Any", writing: "Any", reading: "Any", skip: "Any", dt_bias: "Any",
    states: "Any", rows: "Any", slots: "Any", x_stride: "Any", dt_stride: "Any", writing_stride: "Any",
    reading_stride: "Any", slot_stride: "Any", lowest: "Any", highest: "Any",
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, STATE: tl.constexpr,
    WIDTH: tl.constexpr, SKIPS: tl.constexpr, BIASED: tl.constexpr, SOFTPLUS: tl.constexpr, PICKED: tl.constexpr,
) -> None:  # fmt: skip
    """Program (decode, head, block of the head): one token of a state space model, as ``recurrences.advance`` does.

    x [tokens, HEADS, SIZE]; dt [tokens, HEADS], which gets ``dt_bias`` [HEADS], softplus and its bounds; log_decay,
    skip [HEADS]; writing, reading [tokens, GROUPS, STATE]; states [slots, HEADS, SIZE, STATE]; out float32 as x.
    """
    number, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows + number).to(tl.int64) if PICKED else number
    p, n = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    in_head, in_state = p < SIZE, n < STATE
    step = _time_step(
        tl.load(dt + row * dt_stride + head), dt_bias + head, lowest, highest, BIASED, SOFTPLUS, dt.dtype.element_ty
    )
    numbers = tl.load(x + row * x_stride + head * SIZE + p, mask=in_head, other=0.0).to(tl.float32)
    at = head // (HEADS // GROUPS) * STATE + n
    written = tl.load(writing + row * writing_stride + at, mask=in_state, other=0.0).to(tl.float32)
    read = tl.load(reading + row * reading_stride + at, mask=in_state, other=0.0).to(tl.float32)
    mask = in_head[:, None] & in_state[None, :]
    place = states + tl.load(slots + number).to(tl.int64) * slot_stride + head * SIZE * STATE
    place = place + p[:, None] * STATE + n[None, :]
    state = tl.load(place, mask=mask, other=0.0) * tl.exp(step * tl.load(log_decay + head).to(tl.float32))
    state = state + (step * numbers)[:, None] * written[None, :]
    tl.store(place, state, mask=mask)
    found = tl.sum(state * read[None, :], 1)
    if SKIPS:
        found += tl.load(skip + head).to(tl.float32) * numbers
    tl.store(out + (row * HEADS + head) * SIZE + p, found, mask=in_head)


@triton.jit
def _time_step(
    given: "Any", bias: "Any", lowest: "Any", highest: "Any",
    BIASED: tl.constexpr, SOFTPLUS: tl.constexpr, KIND: tl.constexpr,
) -> "Any":  # fmt: skip
    """The step of a state space model in float32, each of its parts rounded to KIND as torch does."""
    step = given.to(tl.float32)
    if BIASED:
        step = (step + tl.load(bias).to(KIND).to(tl.float32)).to(KIND).to(tl.float32)
    if SOFTPLUS:
        # log(1 + e) for small e: what 1 + e rounds away is put back (Kahan). From 20 on it is the number itself.
        e = tl.exp(tl.minimum(step, 20.0))
        rounded = 1.0 + e
        soft = tl.where(rounded == 1.0, e, tl.log(rounded) * (e / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
        step = tl.where(step > 20.0, step, soft).to(KIND).to(tl.float32)
    return tl.minimum(tl.maximum(step, lowest), highest)


@triton.jit
def _activated(numbers: "Any", SILU: tl.constexpr, KIND: tl.constexpr) -> "Any":
    """Float32 rounded to KIND, and once more after its activation, as torch does."""
    if SILU:
        numbers = numbers.to(KIND).to(tl.float32)
        numbers = numbers / (1.0 + tl.exp(-numbers))
    return numbers.to(KIND)

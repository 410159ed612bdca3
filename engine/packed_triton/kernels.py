"""Triton kernels that compute with weights in planes (``planes.py``): products, and the numbers themselves.

No ``from __future__ import annotations`` here: Triton's interpreter looks at the annotations themselves.
"""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _half_power(exponent: "Any") -> "Any":
    """Half of the power of two that a byte stands for (E8M0), as ``engine.packed.schemes.half_power`` has it."""
    small = tl.where(exponent == 0, 0x00200000, 0x00400000)
    bits = tl.where(exponent < 2, small, (exponent - 1) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _as_float8(byte: "Any") -> "Any":
    """A 256th of what the lowest bytes of unsigned words stand for in E4M3.

    As half precision has it, whose exponent has a bias of 15 where theirs is 7.
    """
    bits = ((byte << 7) & 0x3F80) | ((byte << 8) & 0x8000)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scales_of(
    scales: "Any", fine: "Any", more: "Any", row: "Any", group: "Any", groups: "Any", inside: "Any",
    SCALE: tl.constexpr, SPAN: tl.constexpr, HALF: tl.constexpr,
) -> "Any":  # fmt: skip
    """The scale of groups of 32 columns, and what is taken from the products with it (or from digits, SCALE "zero").

    SPAN groups share a scale of the plane ``scales``; HALF is which 16 columns of a group are meant, where that counts.
    """
    spans = groups // SPAN
    at = row * spans + group // SPAN
    place = row * groups + group
    less = 0.0
    if SCALE == "pairs":  # Q4_K, Q5_K: six bits of a scale, six of a least value, over two numbers of a block
        both = tl.load(fine + place, mask=inside, other=0).to(tl.int32)
        rest = tl.load(more + (place >> 1), mask=inside, other=0).to(tl.int32) >> (4 * (place & 1)).to(tl.int32)
        scale = tl.load(scales + 2 * at, mask=inside, other=0.0).to(tl.float32) * (both & 63).to(tl.float32)
        low = (both >> 6) | ((rest & 15) << 2)
        less = tl.load(scales + 2 * at + 1, mask=inside, other=0.0).to(tl.float32) * low.to(tl.float32)
    elif SCALE == "sixteens":  # Q6_K: a signed byte for 16 columns, over a number of the block
        byte = tl.load(fine + 2 * place + HALF, mask=inside, other=0)
        scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32) * byte.to(tl.float32)
    elif SCALE == "float8":  # NVFP4
        byte = tl.load(fine + 2 * place + HALF, mask=inside, other=0).to(tl.uint32)
        scale = _as_float8(byte) * 256.0 * tl.load(scales + at, mask=inside, other=0.0)
    elif SCALE == "power":  # MXFP4
        scale = _half_power(tl.load(scales + at, mask=inside, other=0).to(tl.int32))
    else:
        scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
        if SCALE == "least":
            less = tl.load(fine + at, mask=inside, other=0.0).to(tl.float32)
        elif SCALE == "zero":
            less = tl.load(fine + at, mask=inside, other=0).to(tl.float32)
    return scale, less


@triton.jit
def _moved(word: "Any", BY: tl.constexpr) -> "Any":
    """Words moved by some bits to the left, or to the right."""
    return word << BY if BY >= 0 else word >> -BY


@triton.jit
def _numbers_of(
    word: "Any", high: "Any", scale: "Any", less: "Any",
    NUMBER: tl.constexpr, SCALE: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, OFFSET: tl.constexpr,
    PLACE: tl.constexpr,
) -> "Any":  # fmt: skip
    """The numbers [channels, groups, words] at one place of each unsigned word, in float32.

    A processor has few instructions for each weight in the time in which it can be read. So an integer stays where it
    is in its word: under the exponent of 2 ** 23 it is a number of so many units of ``2 ** AT``, which is subtracted
    exactly, and the scale, of which there is one for many weights, is divided by as much.
    """
    AT: tl.constexpr = (BITS * PLACE) % 16
    low = word if BITS * PLACE < 16 else word >> 16
    if NUMBER == "integer":
        bits = (low & (((1 << BITS) - 1) << AT)) | 0x4B000000
        if HIGH > 0:
            bits = bits | (_moved(high, AT + BITS - HIGH * PLACE) & (((1 << HIGH) - 1) << (AT + BITS)))
        zero = 8388608.0 + OFFSET * (1 << AT)
        if SCALE == "zero":
            digits = bits.to(tl.float32, bitcast=True) - (less * (1 << AT) + zero)[:, :, None]
        else:
            digits = bits.to(tl.float32, bitcast=True) - zero
        numbers = digits * (scale * (1.0 / (1 << AT)))[:, :, None]
        if SCALE == "pairs" or SCALE == "least":
            numbers = numbers - less[:, :, None]
    elif NUMBER == "fp4":  # as half precision has it, whose exponent has a bias of 15 where that of E2M1 is 1
        bits = (_moved(low, 9 - AT) & 0x0E00) | (_moved(low, 12 - AT) & 0x8000)
        digits = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        numbers = digits * (scale * (16384.0 if SCALE == "float8" else 32768.0))[:, :, None]
    else:
        tl.static_assert(NUMBER == "fp8")
        numbers = _as_float8(_moved(low, -AT)) * (scale * 256.0)[:, :, None]
    return numbers


# As in engine/attention/triton_kernels.py: values that change from step to step compile no new kernel.
@triton.jit(do_not_specialize=("rows", "splits"))
def product_kernel(
    out: "Any", source: "Any", digits: "Any", high: "Any", scales: "Any", fine: "Any", more: "Any",
    slots: "Any", tiles: "Any", rows: "Any", splits: "Any", channels: "Any", groups: "Any",
    NUMBER: tl.constexpr, SCALE: tl.constexpr, SPAN: tl.constexpr, HALVES: tl.constexpr, BITS: tl.constexpr,
    HIGH: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SHARED: tl.constexpr,
) -> None:  # fmt: skip
    """Program (CHANNELS channels, ROWS rows, split): rows times those channels of a matrix; into rows [rows, channels].

    The weights are rounded to the type of ``source``, sums are in float32. With ``splits`` above 1 each program sums a
    part of the columns, into rows [splits, rows, channels]. With SHARED above 0 each expert has a matrix: a program's
    tile says whose, and which of ``slots`` are its rows; slot i is the row i // SHARED of ``source``.
    """
    WORDS: tl.constexpr = BITS  # of 32 columns, which have as many words as a number has bits
    PLACES: tl.constexpr = 32 // BITS
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    index = tl.arange(0, ROWS)
    if SHARED > 0:
        tile = tiles + 3 * tl.program_id(1)
        expert, first, count = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
        if count == 0:
            return
        here = index < count
        target = tl.load(slots + first + index, mask=here, other=0).to(tl.int64)
        origin = target // SHARED
        weight = expert * channels + channel
    else:
        target = tl.program_id(1) * ROWS + index.to(tl.int64)
        here = target < rows
        origin = target
        weight = channel.to(tl.int64)
    known = channel < channels
    each = tl.cdiv(groups, splits * GROUPS) * GROUPS
    start = tl.program_id(2) * each
    word_of = tl.arange(0, WORDS)
    sums = tl.zeros([CHANNELS, ROWS], tl.float32)
    for begin in range(start, tl.minimum(start + each, groups), GROUPS):
        group = begin + tl.arange(0, GROUPS)
        real = group < groups
        inside = known[:, None] & real[None, :]
        place = (weight[:, None] * groups + group[None, :])[:, :, None] * WORDS + word_of[None, None, :]
        word = tl.load(digits + place, mask=inside[:, :, None], other=0, eviction_policy="evict_first")
        word = word.to(tl.uint32, bitcast=True)
        rest = word
        if HIGH > 0:
            rest = tl.load(high + place, mask=inside[:, :, None], other=0).to(tl.uint32)
        at = source + (origin[:, None] * groups + group[None, :])[:, :, None] * 32 + word_of[None, None, :]
        for number in tl.static_range(PLACES):
            if number == 0 or (HALVES and number == PLACES // 2):
                scale, less = _scales_of(
                    scales, fine, more, weight[:, None], group[None, :], groups, inside,
                    SCALE, SPAN, 2 * number // PLACES,
                )  # fmt: skip
            weights = _numbers_of(word, rest, scale, less, NUMBER, SCALE, BITS, HIGH, OFFSET, number)
            given = tl.load(at + number * WORDS, mask=(here[:, None] & real[None, :])[:, :, None], other=0.0)
            given = tl.trans(tl.reshape(given, [ROWS, GROUPS * WORDS]))
            weights = tl.reshape(weights.to(given.dtype), [CHANNELS, GROUPS * WORDS])
            sums = tl.dot(weights, given, sums)
    place = (tl.program_id(2).to(tl.int64) * rows + target[None, :]) * channels + channel[:, None]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=known[:, None] & here[None, :])


@triton.jit(do_not_specialize=("numbers", "splits"))
def sum_kernel(out: "Any", parts: "Any", numbers: "Any", splits: "Any", BLOCK: tl.constexpr) -> None:
    """Program (block): the sums of ``parts`` [splits, numbers] in float32; always in one order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * numbers + at, mask=inside, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("rows", "first"))
def unpack_kernel(
    out: "Any", digits: "Any", high: "Any", scales: "Any", fine: "Any", more: "Any", chosen: "Any",
    rows: "Any", first: "Any", groups: "Any",
    NUMBER: tl.constexpr, SCALE: tl.constexpr, SPAN: tl.constexpr, HALVES: tl.constexpr, BITS: tl.constexpr,
    HIGH: tl.constexpr, OFFSET: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, CHOSEN: tl.constexpr,
) -> None:  # fmt: skip
    """Program (CHANNELS rows, GROUPS groups): the numbers of a matrix, into rows [rows, columns].

    The rows are those from ``first`` on, or those that ``chosen`` names.
    """
    WORDS: tl.constexpr = BITS
    PLACES: tl.constexpr = 32 // BITS
    row = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    word_of = tl.arange(0, WORDS)
    weight = first + row.to(tl.int64)
    if CHOSEN:
        weight = tl.load(chosen + row, mask=row < rows, other=0).to(tl.int64)
    inside = (row < rows)[:, None] & (group < groups)[None, :]
    mask = inside[:, :, None]
    place = (weight[:, None] * groups + group[None, :])[:, :, None] * WORDS + word_of[None, None, :]
    word = tl.load(digits + place, mask=mask, other=0).to(tl.uint32, bitcast=True)
    rest = word
    if HIGH > 0:
        rest = tl.load(high + place, mask=mask, other=0).to(tl.uint32)
    at = out + (row.to(tl.int64)[:, None] * groups + group[None, :])[:, :, None] * 32 + word_of[None, None, :]
    for number in tl.static_range(PLACES):
        if number == 0 or (HALVES and number == PLACES // 2):
            scale, less = _scales_of(
                scales, fine, more, weight[:, None], group[None, :], groups, inside,
                SCALE, SPAN, 2 * number // PLACES,
            )  # fmt: skip
        numbers = _numbers_of(word, rest, scale, less, NUMBER, SCALE, BITS, HIGH, OFFSET, number)
        tl.store(at + number * WORDS, numbers.to(out.dtype.element_ty), mask=mask)

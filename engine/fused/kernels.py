"""Triton kernels of a layer beside its attention: norms, rotations, activations, and products with few rows.

No ``from __future__ import annotations`` here: Triton's interpreter looks at the annotations themselves.
"""

from typing import Any

import triton
import triton.language as tl

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
"""What ``activate_kernel`` computes."""


@triton.jit
def _normalised(
    numbers: "Any", weight: "Any", column: "Any", inside: "Any", eps: "Any",
    SIZE: tl.constexpr, OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr, KIND: tl.constexpr,
) -> "Any":  # fmt: skip
    """A row of float32 over its root mean square, times ``weight + OFFSET``, rounded to KIND.

    Zhang and Sennrich, "Root mean square layer normalization", 2019. ``ROUND_FIRST`` rounds before the weight is
    applied too, as some models do.
    """
    numbers = numbers * (1.0 / tl.sqrt(tl.sum(numbers * numbers, 0) / SIZE + eps))
    if ROUND_FIRST:
        numbers = numbers.to(KIND).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
    return (numbers * scale).to(KIND)


# As in engine/attention/triton_kernels.py: values that change from step to step compile no new kernel, strides do.
@triton.jit(do_not_specialize=("inner",))
def norm_kernel(
    out: "Any", source: "Any", weight: "Any", inner: "Any", outer_stride: "Any", inner_stride: "Any", eps: "Any",
    SIZE: tl.constexpr, WIDTH: tl.constexpr, OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr,
) -> None:  # fmt: skip
    """Program (row): the RMSNorm of the row; into rows [rows, SIZE]."""
    row = tl.program_id(0).to(tl.int64)
    at = row // inner * outer_stride + row % inner * inner_stride
    column = tl.arange(0, WIDTH)
    inside = column < SIZE
    numbers = tl.load(source + at + column, mask=inside, other=0.0).to(tl.float32)
    normed = _normalised(numbers, weight, column, inside, eps, SIZE, OFFSET, ROUND_FIRST, out.dtype.element_ty)
    tl.store(out + row * SIZE + column, normed, mask=inside)


@triton.jit
def add_norm_kernel(
    total: "Any", normed: "Any", residual: "Any", delta: "Any", weight: "Any", eps: "Any",
    delta_weight: "Any", delta_eps: "Any",
    SIZE: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr,
    DELTA_NORM: tl.constexpr, DELTA_OFFSET: tl.constexpr, DELTA_ROUND_FIRST: tl.constexpr,
) -> None:  # fmt: skip
    """Program (row): the sum of ``residual`` and ``delta``, and the RMSNorm of the sum; all rows are [rows, SIZE].

    Before, ``delta`` goes through a norm of its own (``DELTA_NORM``) and is multiplied by SCALE. Each result is rounded
    to the type, as torch does.
    """
    row = tl.program_id(0).to(tl.int64) * SIZE
    column = tl.arange(0, WIDTH)
    inside = column < SIZE
    kind = total.dtype.element_ty
    added = tl.load(delta + row + column, mask=inside, other=0.0).to(tl.float32)
    if DELTA_NORM:
        added = _normalised(
            added, delta_weight, column, inside, delta_eps, SIZE, DELTA_OFFSET, DELTA_ROUND_FIRST, kind
        ).to(tl.float32)
    if SCALE != 1.0:
        added = (added * SCALE).to(kind).to(tl.float32)
    numbers = (tl.load(residual + row + column, mask=inside, other=0.0).to(tl.float32) + added).to(kind)
    tl.store(total + row + column, numbers, mask=inside)
    found = _normalised(numbers.to(tl.float32), weight, column, inside, eps, SIZE, OFFSET, ROUND_FIRST, kind)
    tl.store(normed + row + column, found, mask=inside)


@triton.jit
def rotate_kernel(
    out: "Any", other_out: "Any", source: "Any", other: "Any", cos: "Any", sin: "Any",
    token_stride: "Any", head_stride: "Any", other_token_stride: "Any", other_head_stride: "Any",
    weight: "Any", other_weight: "Any", eps: "Any",
    HEADS: tl.constexpr, OTHER_HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, ANGLES: tl.constexpr,
    NORMED: tl.constexpr, OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr,
) -> None:  # fmt: skip
    """Program (token, head of queries or keys): turn pairs of numbers half a head apart by the token's angles.

    Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021, in the arrangement of GPT-NeoX.
    ``cos`` and ``sin`` are [tokens, ANGLES]: SIZE, or SIZE // 2 where both halves share them. Results are
    [tokens, heads, SIZE]. Each product is rounded as torch does. ``NORMED``: the head goes through its RMSNorm before.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, WIDTH)
    inside = column < SIZE
    partner = tl.where(column < SIZE // 2, column + SIZE // 2, column - SIZE // 2)
    angle = token * ANGLES + tl.where(column < ANGLES, column, column - ANGLES)
    c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.where(column < SIZE // 2, -s, s)
    if head < HEADS:
        at = source + token * token_stride + head * head_stride
        place = out + (token * HEADS + head) * SIZE
        scale = weight
    else:
        at = other + token * other_token_stride + (head - HEADS) * other_head_stride
        place = other_out + (token * OTHER_HEADS + head - HEADS) * SIZE
        scale = other_weight
    plain = tl.load(at + column, mask=inside, other=0.0)
    turned = tl.load(at + partner, mask=inside, other=0.0)
    kind = plain.dtype
    if NORMED:
        plain = _normalised(plain.to(tl.float32), scale, column, inside, eps, SIZE, OFFSET, ROUND_FIRST, kind)
        turned = _normalised(turned.to(tl.float32), scale, partner, inside, eps, SIZE, OFFSET, ROUND_FIRST, kind)
    first = (plain.to(tl.float32) * c).to(kind).to(tl.float32)
    second = (turned.to(tl.float32) * s).to(kind).to(tl.float32)
    tl.store(place + column, (first + second).to(kind), mask=inside)


@triton.jit
def activate_kernel(
    out: "Any", gate: "Any", up: "Any", gate_stride: "Any", up_stride: "Any",
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
) -> None:  # fmt: skip
    """Program (row, block of columns): ``activation(gate) * up``; into rows [rows, SIZE].

    Both results are rounded to the type of ``out``, as torch does.
    """
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    x = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        active = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 x (1 + tanh(y)) is x / (1 + exp(-2 y)).
        active = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(ACTIVATION == "gelu")
        active = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    kind = out.dtype.element_ty
    tl.store(out + row * SIZE + column, (active.to(kind).to(tl.float32) * factor).to(kind), mask=inside)


@triton.jit
def few_rows_kernel(
    out: "Any", source: "Any", weight: "Any", bias: "Any", inputs: "Any", outputs: "Any",
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, BIASED: tl.constexpr,
) -> None:  # fmt: skip
    """Program (block of OUTPUTS): ``source`` [ROWS, inputs] times those rows of ``weight`` [outputs, inputs].

    1, 2 or 4 rows, sums in float32, each weight read once. Programs are many and small, so that all multiprocessors
    read at once even for few outputs, and each thread keeps its own sums to the end. ``outputs`` is a multiple of
    OUTPUTS; WHOLE: ``inputs`` is one of BLOCK.
    """
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, BLOCK)[None, :]
    weights = weight + output[:, None].to(tl.int64) * inputs + column
    sums = tl.zeros([OUTPUTS, BLOCK], tl.float32)
    second, third, fourth = sums, sums, sums
    for begin in range(0, inputs, BLOCK):
        inside = True if WHOLE else column < inputs - begin
        numbers = tl.load(weights + begin, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        at = source + begin + column
        sums += numbers * tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if ROWS > 1:
            second += numbers * tl.load(at + inputs, mask=inside, other=0.0).to(tl.float32)
        if ROWS > 2:
            third += numbers * tl.load(at + 2 * inputs, mask=inside, other=0.0).to(tl.float32)
            fourth += numbers * tl.load(at + 3 * inputs, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(bias + output).to(tl.float32) if BIASED else 0.0
    kind = out.dtype.element_ty
    tl.store(out + output, (tl.sum(sums, 1) + added).to(kind))
    if ROWS > 1:
        tl.store(out + outputs + output, (tl.sum(second, 1) + added).to(kind))
    if ROWS > 2:
        tl.store(out + 2 * outputs + output, (tl.sum(third, 1) + added).to(kind))
        tl.store(out + 3 * outputs + output, (tl.sum(fourth, 1) + added).to(kind))

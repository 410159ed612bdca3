"""The kernel that writes the keys and values of a step into their blocks.

No ``from __future__ import annotations`` here: Triton's interpreter looks at the annotations themselves.
"""

from typing import Any

import triton
import triton.language as tl

from engine.attention.triton_kernels import VARYING
from engine.cache import fp8

_ROUND_UP = tl.constexpr(fp8.ROUND_UP)
_LARGEST_EXPONENT = tl.constexpr(fp8.LARGEST_EXPONENT)
_LEAST_SCALE = tl.constexpr(fp8.LEAST_SCALE)


@triton.jit(do_not_specialize=VARYING)
def write_kernel(
    index: "Any", keys: "Any", values: "Any", key_scales: "Any", value_scales: "Any", new_keys: "Any",
    new_values: "Any", num_tokens: "Any", tables_at: "Any", token_stride: "Any", head_stride: "Any",
    value_token_stride: "Any", value_head_stride: "Any",
    KV_HEADS: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAIRS: tl.constexpr, FP8: tl.constexpr,
    LATENT: tl.constexpr,
) -> None:  # fmt: skip
    """One program for ``PAIRS`` pairs of token and kv head: their keys and values into the tokens' slots.

    ``LATENT`` keys hold their values, their first ``VALUE_SIZE`` numbers: only keys are written, and ``KEY_WIDTH`` is
    that of their other numbers, so that no key is padded to the next power of two. Blocks are [slots, kv heads, size],
    and with ``FP8`` scales [slots, kv heads] (``engine.cache.fp8``). What is not finite becomes 0; see
    ``ReferenceAttention.write_kv`` for why nothing else may enter a block.
    """
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    token, head = pair // KV_HEADS, pair % KV_HEADS
    there = token < num_tokens
    position = tl.load(index + token, mask=there, other=0)
    table = tl.load(index + num_tokens + token, mask=there, other=0)
    block = tl.load(index + tables_at + table + position // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
    page = (block * BLOCK_SIZE + position % BLOCK_SIZE) * KV_HEADS + head
    k, v = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    at = token * token_stride + head * head_stride
    if LATENT:
        first, rest = there[:, None] & (v < VALUE_SIZE)[None, :], there[:, None] & (k < KEY_SIZE - VALUE_SIZE)[None, :]
        latent = _finite(tl.load(new_keys + at[:, None] + v[None, :], mask=first, other=0.0))
        rotated = _finite(tl.load(new_keys + at[:, None] + VALUE_SIZE + k[None, :], mask=rest, other=0.0))
        largest = tl.maximum(_largest(latent), _largest(rotated))
        place = keys + page[:, None] * KEY_SIZE
        _store(place + v[None, :], key_scales + page, latent, largest, first, there, FP8)
        _store(place + VALUE_SIZE + k[None, :], key_scales + page, rotated, largest, rest, there, FP8)
    else:
        mask = there[:, None] & (k < KEY_SIZE)[None, :]
        key = _finite(tl.load(new_keys + at[:, None] + k[None, :], mask=mask, other=0.0))
        place = keys + page[:, None] * KEY_SIZE + k[None, :]
        _store(place, key_scales + page, key, _largest(key), mask, there, FP8)
        at, mask = token * value_token_stride + head * value_head_stride, there[:, None] & (v < VALUE_SIZE)[None, :]
        value = _finite(tl.load(new_values + at[:, None] + v[None, :], mask=mask, other=0.0))
        place = values + page[:, None] * VALUE_SIZE + v[None, :]
        _store(place, value_scales + page, value, _largest(value), mask, there, FP8)


@triton.jit
def _largest(numbers: "Any") -> "Any":
    return tl.max(tl.abs(numbers.to(tl.float32)), 1)


@triton.jit
def _store(
    place: "Any", scale: "Any", numbers: "Any", largest: "Any", mask: "Any", there: "Any", FP8: tl.constexpr
) -> None:
    """Rows of ``numbers``, 0 where they are not in ``mask``; with ``FP8`` as ``fp8.quantise`` makes them of rows whose
    largest numbers are ``largest``."""
    if FP8:
        power = ((largest.to(tl.int32, bitcast=True) + _ROUND_UP) >> 23) - _LARGEST_EXPONENT
        power = tl.maximum(power, _LEAST_SCALE)
        inverse = ((254 - power) << 23).to(tl.float32, bitcast=True)
        tl.store(scale, power.to(tl.uint8), mask=there)
        numbers = (numbers.to(tl.float32) * inverse[:, None]).to(place.dtype.element_ty)
    tl.store(place, numbers, mask=mask)


@triton.jit
def _finite(numbers: "Any") -> "Any":
    return tl.where(tl.abs(numbers.to(tl.float32)) < float("inf"), numbers, 0.0)

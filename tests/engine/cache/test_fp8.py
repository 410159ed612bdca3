"""Keys and values in eight bits: what is stored, and what is read back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.cache.fp8 import LEAST_SCALE, dequantise, quantise

# Float32 numbers whose largest quotient is a power of two within what scales can be.
numbers = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20)


@given(row=numbers)
def test_each_number_is_the_nearest_that_the_head_can_have(row: list[float]) -> None:
    given_row = torch.tensor([row], dtype=torch.float32)
    stored, scales = quantise(given_row)
    assert (stored.dtype, scales.dtype, scales.shape) == (torch.float8_e4m3fn, torch.uint8, (1,))
    scale = 2.0 ** (int(scales[0]) - 127)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    possible = every[every.isfinite()] * scale
    nearest = (given_row.double()[0, :, None] - possible).abs().amin(dim=1)
    found = dequantise(stored, scales, torch.float32).double()
    assert torch.equal((found[0] - given_row[0].double()).abs(), nearest)
    largest = max(map(abs, given_row[0].tolist()))
    assert largest <= 448 * scale
    assert scales[0] == LEAST_SCALE or largest > 448 * scale / 2


@given(row=numbers)
def test_bfloat16_holds_what_is_read(row: list[float]) -> None:
    stored, scales = quantise(torch.tensor([row], dtype=torch.float32))
    exact = dequantise(stored, scales, torch.float32)
    assert torch.equal(dequantise(stored, scales, torch.bfloat16).float(), exact)
    again, same = quantise(exact)
    assert torch.equal(dequantise(again, same, torch.float32), exact)


@pytest.mark.parametrize(
    ("row", "exponent", "stored"),
    [
        ([448.0, 1.0], 127, [448.0, 1.0]),
        ([449.0, 0.0], 128, [224.0, 0.0]),
        ([1.0625, 1.1875, -1.75], 119, [272 - 16.0, 304 + 16.0, -448.0]),  # halves go to the even neighbour
        ([0.0, 0.0], LEAST_SCALE, [0.0, 0.0]),
        ([1e-40, -1e-40], LEAST_SCALE, [0.0, -0.0]),
    ],
)
def test_scales_and_rounding(row: list[float], exponent: int, stored: list[float]) -> None:
    found, scales = quantise(torch.tensor([row]))
    assert scales.tolist() == [exponent]
    assert found.float().tolist() == [stored]


def test_heads_have_scales_of_their_own() -> None:
    heads = torch.tensor([[1.0, 0.3], [1e4, 3e3], [1e-4, 3e-5]])
    stored, scales = quantise(heads.view(3, 1, 2))
    assert scales.shape == (3, 1)
    assert len(set(scales.flatten().tolist())) == 3
    torch.testing.assert_close(dequantise(stored, scales, torch.float32).view(3, 2), heads, rtol=2**-4, atol=0)


def test_the_largest_float16_stays_finite() -> None:
    stored, scales = quantise(torch.tensor([[65504.0, 1.0]], dtype=torch.float16))
    assert dequantise(stored, scales, torch.float16).isfinite().all()

"""Numbers in blocks: the bytes that the gguf package makes, and FP8 to half of a step."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from engine.api.errors import ModelRefused
from engine.packed import encoders
from engine.packed.encoders import ENCODERS, in_blocks
from engine.packed.published_schemes import F8_32, F8_128
from engine.packed.schemes import BY_NAME


def numbers(rows: int = 96, columns: int = 256) -> torch.Tensor:
    """Of all sizes, with rows and blocks of zeros, halves between two digits, and the largest twice in a block."""
    made = torch.Generator().manual_seed(3)
    found = torch.randn(rows, columns, generator=made) * 10.0 ** torch.randint(-6, 4, (rows, 1), generator=made)
    found[3] = 0
    found[5, 32:64] = 0
    found[7] = torch.arange(columns).remainder(255) / 2 - 63.5  # the largest of its blocks is half of 127
    found[9, :64] = torch.tensor([-4.0, 4.0]).repeat(32)
    return found


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_have_the_bytes_of_the_reference(name: str, dtype: torch.dtype) -> None:
    given = numbers().to(dtype)
    expected = gguf.quantize(given.float().numpy(), Kind[name])
    found = in_blocks(given, BY_NAME[name])
    assert np.array_equal(found.data.numpy(), expected)
    assert found.shape == given.shape


@pytest.mark.parametrize("scheme", [F8_128, F8_32], ids=lambda scheme: scheme.name)
def test_fp8_is_off_by_at_most_half_a_step(scheme: object) -> None:
    given = numbers()
    assert scheme in (F8_128, F8_32)
    kind = F8_128 if scheme is F8_128 else F8_32
    found = in_blocks(given, kind).unpacked()
    largest = given.unflatten(1, (-1, kind.columns)).abs().amax(2).repeat_interleave(kind.columns, 1)
    # Three bits behind the leading one, down to 2 ** -6 of 448 for the largest, and steps of 2 ** -9 below.
    allowed = torch.maximum(given.abs() / 16, largest / 448 * 2**-10) * 1.0001
    assert bool(((found - given).abs() <= allowed).all())
    assert torch.equal(found.abs().amax(), given.abs().amax())


def test_many_rows_and_stacks_are_done_in_parts() -> None:
    given = numbers(16, 1 << 16).view(2, 8, 1 << 16)
    assert given.numel() > 2 * encoders._TOGETHER
    found = in_blocks(given, BY_NAME["Q8_0"])
    assert found.shape == given.shape
    assert torch.equal(found.data[1, 2], in_blocks(given[1, 2][None], BY_NAME["Q8_0"]).data[0])


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e9])
def test_numbers_that_no_block_holds_are_refused(name: str, bad: float) -> None:
    given = torch.ones(4, 128)
    given[2, 5] = bad
    scheme = {"F8_128": F8_128, "F8_32": F8_32, **BY_NAME}[name]
    with pytest.raises(ModelRefused, match="numbers that are not finite, or far too large"):
        in_blocks(given, scheme)


def test_next_to_nothing_becomes_nothing() -> None:
    """The inverse of such a scale is no number in float32."""
    given = torch.full((2, 128), 1e-41)
    assert all(bool(in_blocks(given, kind).unpacked().eq(0).all()) for kind in (BY_NAME["Q8_0"], F8_128))

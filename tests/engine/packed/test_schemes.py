"""What blocks mean: the numbers of the ``gguf`` package, bit for bit, also of blocks that it wrote itself."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from engine.packed import schemes
from engine.packed.schemes import SCHEMES, Blocks, Scheme

KINDS = pytest.mark.parametrize("kind", SCHEMES, ids=lambda kind: SCHEMES[kind].name)
WRITABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")


def same_bits(found: torch.Tensor, expected: np.ndarray) -> bool:
    """Whether all numbers are the same; a block of random bytes may have a scale that is no number."""
    finite = np.isfinite(expected)
    assert finite.mean() > 0.9
    return bool((found.numpy().view(np.uint32)[finite] == expected.view(np.uint32)[finite]).all())


@KINDS
def test_numbers_are_those_of_gguf_bit_for_bit(kind: int) -> None:
    scheme, known = SCHEMES[kind], gguf.GGMLQuantizationType(kind)
    assert known.name == scheme.name
    assert gguf.GGML_QUANT_SIZES[known] == (scheme.columns, scheme.block_bytes)
    raw = np.random.default_rng(kind).integers(0, 256, (300, 2 * scheme.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, known)
    blocks = Blocks(torch.from_numpy(raw), scheme)
    assert blocks.shape == expected.shape
    assert same_bits(blocks.unpacked(), expected)


@pytest.mark.parametrize("name", WRITABLE)
def test_blocks_that_gguf_wrote(name: str) -> None:
    weights = np.random.default_rng(1).standard_normal((64, 256), dtype=np.float32)
    known = gguf.GGMLQuantizationType[name]
    raw = gguf.quantize(weights, known)
    found = Blocks(torch.from_numpy(raw), schemes.BY_NAME[name]).unpacked()
    assert same_bits(found, gguf.dequantize(raw, known))
    assert (found - torch.from_numpy(weights)).abs().max() < 1.0


def test_every_exponent_of_a_power_of_two() -> None:
    """Also where half of it is subnormal, and where the byte would be NaN in other formats."""
    found = schemes.half_power(torch.arange(256, dtype=torch.uint8)).double()
    assert torch.equal(found, 2.0 ** (torch.arange(256, dtype=torch.float64) - 128))


def test_rows_chunks_and_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows, many at a time, and matrices above one another give the numbers of all."""
    scheme = schemes.BY_NAME["Q4_1"]
    raw = torch.from_numpy(gguf.quantize(np.random.default_rng(2).random((40, 64), np.float32), 3))
    whole = Blocks(raw, scheme).unpacked()
    assert torch.equal(Blocks(raw, scheme).rows(torch.tensor([7, 0, 7])), whole[[7, 0, 7]])
    assert torch.equal(Blocks(raw.view(5, 8, -1), scheme).unpacked(), whole.view(5, 8, 64))
    monkeypatch.setattr(schemes, "CHUNK", 3 * 64)
    assert torch.equal(Blocks(raw, scheme).unpacked(), whole)
    assert torch.equal(Blocks(raw, scheme).unpacked(torch.bfloat16), whole.bfloat16())


def test_an_input_in_another_order_meets_the_same_numbers() -> None:
    raw = torch.from_numpy(gguf.quantize(np.random.default_rng(3).random((8, 64), np.float32), 2))
    plain = Blocks(raw, schemes.BY_NAME["Q4_0"])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    ordered = Blocks(raw, plain.scheme, order)
    source = torch.rand(3, 64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(ordered.unpacked()[:, order], plain.unpacked())
    apart = source @ ordered.unpacked().T - source[:, order] @ plain.unpacked().T
    assert apart.abs().max() < 1e-4
    assert torch.equal(ordered.rows(torch.tensor([5])), ordered.unpacked()[[5]])


def test_a_scheme_knows_the_size_of_a_row() -> None:
    assert Scheme("any", 256, 144, lambda blocks: blocks).row_bytes(1024) == 576

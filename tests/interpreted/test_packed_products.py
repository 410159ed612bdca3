"""Products by weights in planes: of every scheme, for few rows and for many, split or not; and what is looked up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.random_blocks import random_blocks
from torch.nn import functional

from engine.closeness import REORDERED_SUMS, difference
from engine.packed_triton import products
from engine.packed_triton.planes import LAYOUTS, Planes, planes_of
from engine.packed_triton.products import PlanesProduct, multiplied, unpacked
from engine.packed_triton.tiles import OTHERS, TILES

CPU = torch.device("cpu")
CHANNELS = 20
# Whole blocks, and no whole number of tiles.
COLUMNS = dict.fromkeys(LAYOUTS, 5 * 32) | dict.fromkeys(("Q4_K", "Q5_K", "Q6_K"), 2 * 256)
COLUMNS |= {name: 3 * 128 for name in LAYOUTS if name.endswith("_128")} | {"NVFP4": 5 * 64}
SCHEMES = pytest.mark.parametrize("name", LAYOUTS)


def made(name: str, channels: int = CHANNELS) -> tuple[Planes, torch.Tensor]:
    """A matrix in planes, and its numbers in float32."""
    blocks = random_blocks(name, channels, COLUMNS[name])
    planes = planes_of(blocks, CPU)
    assert planes is not None
    assert planes.nbytes == blocks.data.nbytes
    return planes, blocks.unpacked()


def rows_of(count: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(dtype)


def apart(rows: torch.Tensor, numbers: torch.Tensor, found: torch.Tensor) -> float:
    """From a product of the rounded numbers: how far, as a share of what rounding explains."""
    expected = rows.float() @ numbers.to(rows.dtype).float().T
    return difference(found, expected) / REORDERED_SUMS[rows.dtype]


@SCHEMES
def test_numbers_are_those_of_the_blocks_bit_for_bit(name: str) -> None:
    planes, numbers = made(name)
    assert torch.equal(unpacked(planes, torch.float32), numbers)
    chosen = torch.tensor([7, 0, 19, 7])
    assert torch.equal(unpacked(planes, torch.bfloat16, chosen=chosen), numbers[chosen].bfloat16())
    assert torch.equal(unpacked(planes, torch.float16, 5, 3), numbers[5:8].half())


@SCHEMES
def test_few_rows(name: str) -> None:
    planes, numbers = made(name)
    for count, dtype in ((1, torch.bfloat16), (3, torch.float16), (16, torch.bfloat16)):
        rows = rows_of(count, planes.columns, dtype)
        assert apart(rows, numbers, multiplied(rows, planes)) < 0.3


@pytest.mark.parametrize("name", ["Q6_K", "F8_32"])
def test_sums_in_parts_are_the_same_each_time(name: str) -> None:
    planes, numbers = made(name)
    rows = rows_of(2, planes.columns, torch.bfloat16)
    found = multiplied(rows, planes, replace(TILES[0], groups=4), splits=2)
    assert apart(rows, numbers, found) < 0.3
    assert torch.equal(found, multiplied(rows, planes, replace(TILES[0], groups=4), splits=2))


def test_tiles_that_a_check_times_compute_the_same() -> None:
    planes, numbers = made("Q4_K", 70)
    for tile in (*TILES, *OTHERS):
        rows = rows_of(tile.rows + 1, planes.columns, torch.float16)
        assert apart(rows, numbers, multiplied(rows, planes, tile)) < 0.3


def test_many_rows_are_multiplied_panel_by_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    planes, numbers = made("I4_128", 70)
    monkeypatch.setattr(products, "FEW_ROWS", 4)
    monkeypatch.setattr(products, "PANEL_BYTES", 32 * planes.columns * 2)
    rows = rows_of(5, planes.columns, torch.bfloat16)
    assert apart(rows, numbers, PlanesProduct(planes, torch.bfloat16)(rows)) < 0.3


def test_an_input_in_another_order() -> None:
    blocks = random_blocks("Q8_0", 8, 64)
    ordered = replace(blocks, order=torch.randperm(64, generator=torch.Generator().manual_seed(3)))
    planes = planes_of(blocks, CPU)
    assert planes is not None
    product = PlanesProduct(planes, torch.float16, ordered.order)
    numbers, rows = ordered.unpacked(), rows_of(2, 64, torch.float16)
    torch.testing.assert_close(product(rows), functional.linear(rows, numbers.half()), rtol=4e-3, atol=0.1)
    assert torch.equal(product.unpacked(torch.float32), numbers)
    assert torch.equal(product.rows(torch.tensor([3])), numbers[3:4].half())


def test_nothing_of_no_rows() -> None:
    planes, _ = made("Q4_0")
    product = PlanesProduct(planes, torch.bfloat16)
    assert product(torch.zeros(0, planes.columns, dtype=torch.bfloat16)).shape == (0, CHANNELS)
    assert product.rows(torch.zeros(0, dtype=torch.long)).shape == (0, planes.columns)

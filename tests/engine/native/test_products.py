"""Products of the compiled code by blocks of every scheme: those of their numbers in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.native import compile_once
from support.panels import columns_of, random_blocks, scheme_of

from engine.api.errors import ModelRefused
from engine.native import build
from engine.native.packing import KINDS, Format
from engine.native.products import Products, knows, panels_of
from engine.packed.published_schemes import BF16
from engine.packed.schemes import Blocks

CHANNELS = 72  # not a multiple of 16: the last panel is filled up
Product = Callable[[Blocks], Callable[[torch.Tensor], torch.Tensor] | None]


@pytest.fixture(scope="module")
def product_of(tmp_path_factory: pytest.TempPathFactory) -> Product:
    with pytest.MonkeyPatch.context() as patch:
        compile_once(tmp_path_factory, patch)
        return Products(build.load_library(None), 2).product_of


def blocks_of(kind: str, columns: int) -> Blocks:
    return Blocks(random_blocks(kind, CHANNELS, columns, notable=False).flatten(1), scheme_of(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_numbers(kind: str, product_of: Product) -> None:
    blocks = blocks_of(kind, 3 * columns_of(kind))
    product = product_of(blocks)
    assert product is not None
    for rows in (1, 2, 5, 18):
        x = torch.randn(rows, blocks.shape[1], generator=torch.Generator().manual_seed(rows))
        expected = x @ blocks.unpacked().T
        assert (product(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_bfloat16_stays_as_it_is() -> None:
    panels = panels_of(blocks_of("BF16", 64))
    assert panels.format is Format.BRAIN
    assert panels.data.numel() == 80 * 64 * 2


def test_columns_that_are_no_whole_blocks_of_a_panel_are_not_known() -> None:
    assert knows(BF16, (16, 96))
    assert not knows(BF16, (16, 80))


@pytest.mark.parametrize("kind", ["F8_128", "F8_32", "NVFP4"])
@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_fp8_that_is_no_number_is_refused(kind: str, byte: int) -> None:
    blocks = blocks_of(kind, 256)
    blocks.data[-1, 5] = byte
    with pytest.raises(ModelRefused, match=r"0x7f or 0xff, which are not numbers"):
        panels_of(blocks)

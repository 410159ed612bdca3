"""Products with panels of every format: of the weights that they stand for, whatever is computed beside a row."""

from __future__ import annotations

import pytest
import torch
from support.panels import Kernels, random_blocks

from engine.native.packing import KINDS, Format, Panels, format_of, pack_blocks, pack_floats

ROWS = (1, 2, 3, 4, 5, 8, 11, 16, 17)
CHANNELS, COLUMNS = 112, 512  # more panels than are computed together


@pytest.fixture(scope="module", params=(None, 4, 16))
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(tmp_path_factory.mktemp("kernels"), request.param)


def packed(format: Format) -> Panels:
    """Random weights in a format."""
    weight = torch.randn(CHANNELS, COLUMNS, generator=torch.Generator().manual_seed(0))
    if format > Format.BRAIN:
        kind = next(kind for kind in KINDS if format_of(kind) is format)
        return pack_blocks(random_blocks(kind, CHANNELS, COLUMNS, notable=False), kind)
    return pack_floats(weight if format is Format.FLOAT else weight.bfloat16().float())


def activations(rows: int) -> torch.Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(1))


def require_products(kernels: Kernels, parts: list[tuple[torch.Tensor, Format]], weights: torch.Tensor) -> None:
    """For all numbers of rows, the products are right and those of each row are the same bit by bit."""
    x = activations(ROWS[-1])
    expected, alone = x @ weights.T, torch.cat([kernels.product(parts, row[None]) for row in x])
    assert (alone - expected).abs().max() < 1e-5 * expected.abs().max()
    for rows in ROWS:
        assert torch.equal(kernels.product(parts, x[-rows:].contiguous()), alone[-rows:])


@pytest.mark.parametrize("format", Format)
def test_products_are_those_of_the_weights(format: Format, kernels: Kernels) -> None:
    panels = packed(format)
    require_products(kernels, [(panel, format) for panel in panels.data], kernels.unpacked(panels, COLUMNS))


@pytest.mark.parametrize(
    "formats",
    [(Format.Q4_K, Format.Q6_K), (Format.Q8_0, Format.Q5_0, Format.BRAIN), (Format.Q4_0, *[Format.Q8_0] * 3)],
    ids=["two", "three", "few"],
)
def test_panels_of_several_formats_lie_side_by_side(formats: tuple[Format, ...], kernels: Kernels) -> None:
    """As where queries, keys and values are of several types, or where gates and their inputs alternate."""
    each = [packed(format) for format in formats]
    wholes = [kernels.unpacked(panels, COLUMNS).unflatten(0, (-1, 16)) for panels in each]
    parts, weights = [], []
    for index in range(CHANNELS // 16):
        turn = index % len(formats)
        parts.append((each[turn].data[index], formats[turn]))
        weights.append(wholes[turn][index])
    require_products(kernels, parts, torch.cat(weights))

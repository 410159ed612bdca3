"""How products are divided among programs, by rule."""

from __future__ import annotations

import pytest

from engine.packed_triton.tiles import FEW_ROWS, OTHERS, TILES, Tile, splits_of, tile_of


def test_tiles_grow_with_the_rows() -> None:
    assert [tile.rows for tile in TILES] == sorted({tile.rows for tile in TILES})
    assert [tile_of(rows).rows for rows in (1, 16, 17, 64, 65, FEW_ROWS)] == [16, 16, 32, 64, 64, 64]
    assert not set(OTHERS) & set(TILES)


@pytest.mark.parametrize("tile", [*TILES, *OTHERS])
def test_each_warp_has_channels_of_its_own(tile: Tile) -> None:
    """16 channels at least, or warps would unpack the same weights; all sizes are powers of two."""
    assert tile.channels >= 16 * tile.warps
    for size in (tile.rows, tile.channels, tile.groups, tile.warps):
        assert size & (size - 1) == 0
    assert tile.rows >= 16


@pytest.mark.parametrize(
    ("rows", "channels", "columns", "splits"),
    [
        (1, 4096, 4096, 4),  # the output of an attention of 8B
        (1, 1024, 4096, 4),  # its keys; no part has fewer than 32 groups
        (1, 4096, 14336, 4),  # the last map of its MLP
        (1, 28672, 4096, 1),  # the first ones
        (1, 128256, 4096, 1),  # its head
        (256, 4096, 4096, 1),
        (1, 64, 32, 1),
    ],
)
def test_few_channels_are_summed_in_parts(rows: int, channels: int, columns: int, splits: int) -> None:
    assert splits_of(tile_of(rows), rows, channels, columns // 32) == splits

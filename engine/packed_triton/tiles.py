"""How products are divided among programs: by rule from their shapes, so that nothing is tuned while a model serves.

The numbers of ``TILES`` are estimates from the bytes and the operations of a weight: no GPU has chosen them yet.
``scripts/gpu_check`` times each product with them and with others (docs/gpu.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FEW_ROWS = 256
"""Up to so many rows weights are unpacked in a product; beyond, for all rows at once before it."""

PANEL_BYTES = 64 << 20
"""What weights may take that are unpacked for a moment. Large enough that a product of them fills a GPU."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows, channels and groups of 32 columns in a tile of a program, and its warps and stages."""

    rows: int
    channels: int
    groups: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        """What a launch is given."""
        return {
            "ROWS": self.rows, "CHANNELS": self.channels, "GROUPS": self.groups,
            "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip


TILES = (Tile(16, 64, 8, 4, 3), Tile(32, 64, 8, 4, 3), Tile(64, 64, 4, 4, 3))
"""By their rows. Matrix units take 16 rows at least, and 64 channels of 4 warps, or warps unpack the same weights."""

OTHERS = (Tile(16, 64, 16, 4, 2), Tile(16, 64, 4, 4, 4), Tile(16, 128, 8, 8, 3), Tile(64, 128, 4, 8, 3))
"""What ``scripts/gpu_check`` times beside them."""

UNPACKING = {"CHANNELS": 8, "GROUPS": 32, "num_warps": 4}
"""The tiles of ``unpack_kernel``."""

_PROGRAMS = 256
"""A GPU has about 130 processors, each of which hides the waiting of one program behind another."""
_MOST_SPLITS = 8
_SHARE = 32
"""Groups that a part of a split sum has at least, or adding the parts takes longer than it saves."""


def tile_of(rows: int) -> Tile:
    """The tile for a product of so many rows."""
    return next((tile for tile in TILES if rows <= tile.rows), TILES[-1])


def splits_of(tile: Tile, rows: int, channels: int, groups: int) -> int:
    """In how many parts columns are summed: a power of two, so that programs are enough where channels are few."""
    programs = -(-channels // tile.channels) * -(-rows // tile.rows)
    splits = 1
    while splits < _MOST_SPLITS and programs * splits < _PROGRAMS and groups >= 2 * splits * _SHARE:
        splits *= 2
    return splits

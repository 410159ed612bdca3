"""Products by weights in planes, on the device that holds them.

Few rows are multiplied by a kernel that unpacks as it reads. For many, weights are unpacked a panel at a time, and
multiplied by torch. Either way the weights are those numbers that they unpack to, rounded to the type of the rows, and
sums are in float32.
"""

from __future__ import annotations

import torch
import triton

from engine.packed_triton.kernels import product_kernel, sum_kernel, unpack_kernel
from engine.packed_triton.planes import GROUP, Planes
from engine.packed_triton.tiles import FEW_ROWS, PANEL_BYTES, UNPACKING, Tile, splits_of, tile_of

_BLOCK = 1024


class PlanesProduct:
    """A matrix [channels, columns] in planes: multiplies rows, and has its own rows, unpacked.

    ``order`` [columns], where it is set, is how rows are gathered before (``Blocks.order``).
    """

    def __init__(self, planes: Planes, dtype: torch.dtype, order: torch.Tensor | None = None) -> None:
        self.planes = planes
        self.dtype = dtype
        self._order = None if order is None else order.to(planes.digits.device)

    @property
    def device(self) -> torch.device:
        return self.planes.digits.device

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [rows, columns] of the type ``dtype``, end to end: [rows, channels], of that type too."""
        if self._order is not None:
            rows = rows.index_select(1, self._order)
        if len(rows) <= FEW_ROWS:
            return multiplied(rows, self.planes)
        out = rows.new_empty(len(rows), self.planes.rows)
        together = max(1, PANEL_BYTES // (self.planes.columns * self.dtype.itemsize))
        for first in range(0, self.planes.rows, together):
            count = min(together, self.planes.rows - first)
            panel = unpacked(self.planes, self.dtype, first, count)
            torch.mm(rows, panel.T, out=out[:, first : first + count])
            del panel  # before the next one is made, which then has its memory
        return out

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """The numbers of some rows of the matrix: [len(numbers), columns], of the type ``dtype``."""
        return self._ordered(unpacked(self.planes, self.dtype, chosen=numbers))

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """All of its numbers, in the order of the model's own columns."""
        return self._ordered(unpacked(self.planes, dtype))

    def _ordered(self, numbers: torch.Tensor) -> torch.Tensor:
        if self._order is not None:
            numbers[:, self._order] = numbers.clone()
        return numbers


def multiplied(rows: torch.Tensor, planes: Planes, tile: Tile | None = None, splits: int | None = None) -> torch.Tensor:
    """Rows [rows, columns] times a matrix in planes: [rows, channels]. What is not given is chosen by their shapes."""
    count, channels, groups = len(rows), planes.rows, planes.columns // GROUP
    out = rows.new_empty(count, channels)
    if not count:
        return out
    tile = tile or tile_of(count)
    splits = splits or splits_of(tile, count, channels, groups)
    parts = out if splits == 1 else rows.new_empty(splits, count, channels, dtype=torch.float32)
    grid = triton.cdiv(channels, tile.channels), triton.cdiv(count, tile.rows), splits
    product_kernel[grid](
        parts,
        rows,
        *planes.tensors,
        rows,
        rows,
        count,
        splits,
        channels,
        groups,
        SHARED=0,
        **planes.constants,
        **tile.options,
    )
    if splits > 1:
        blocks = triton.cdiv(out.numel(), _BLOCK)
        sum_kernel[(blocks,)](out, parts, out.numel(), splits, BLOCK=_BLOCK, num_warps=4)
    return out


def unpacked(
    planes: Planes,
    dtype: torch.dtype,
    first: int = 0,
    count: int | None = None,
    *,
    chosen: torch.Tensor | None = None,
) -> torch.Tensor:
    """The numbers of rows of a matrix in planes: all, ``count`` from ``first`` on, or those that ``chosen`` names."""
    rows = (planes.rows if count is None else count) if chosen is None else len(chosen)
    groups = planes.columns // GROUP
    out = torch.empty(rows, planes.columns, dtype=dtype, device=planes.digits.device)
    if not rows:
        return out
    grid = triton.cdiv(rows, UNPACKING["CHANNELS"]), triton.cdiv(groups, UNPACKING["GROUPS"])
    unpack_kernel[grid](
        out,
        *planes.tensors,
        planes.digits if chosen is None else chosen,
        rows,
        first,
        groups,
        CHOSEN=chosen is not None,
        **planes.constants,
        **UNPACKING,
    )
    return out

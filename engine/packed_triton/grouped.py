"""Experts in planes: one launch for the maps of all experts, whose rows are grouped by expert on the device.

Nothing waits for the device, and all shapes follow from the number of tokens: so a step can be recorded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from engine.packed_triton.kernels import product_kernel
from engine.packed_triton.planes import GROUP, Planes
from engine.packed_triton.products import PlanesProduct
from engine.packed_triton.tiles import Tile, tile_of


@dataclass(frozen=True, slots=True)
class Plan:
    """Which rows an expert computes: ``slots`` [slots], sorted by expert, and tiles of them.

    A slot is one of the experts of a token. ``tiles`` [tiles, 3] are an expert, the first of its slots, and how many;
    those beyond the last have none.
    """

    slots: torch.Tensor
    tiles: torch.Tensor
    tile: Tile


def plan_of(places: torch.Tensor, experts: int) -> Plan:
    """The plan for slots [slots] that name their expert. Numbers from ``experts`` on name none."""
    count = len(places)
    tile = tile_of(-(-count // experts))
    most = min(count, count // tile.rows + experts)  # an expert has one tile at most that is not full
    ordered, slots = torch.sort(places)
    numbers = torch.arange(experts + 1, device=places.device, dtype=places.dtype)
    starts = torch.searchsorted(ordered, numbers)
    counts = starts.diff()
    tiles = -(-counts // tile.rows)
    ends = tiles.cumsum(0)
    number = torch.arange(most, device=places.device)
    expert = torch.searchsorted(ends, number, right=True).clamp(max=experts - 1)
    done = tile.rows * (number - ends[expert] + tiles[expert])
    left = torch.where(number < ends[-1], counts[expert] - done, 0).clamp(0, tile.rows)
    return Plan(slots, torch.stack([expert, starts[expert] + done, left], dim=1).to(torch.int32), tile)


class PlanesStack:
    """Matrices [experts, channels, columns] in planes."""

    def __init__(self, planes: Planes, experts: int, dtype: torch.dtype) -> None:
        self.planes = planes
        self.dtype = dtype
        self._experts = experts
        self._channels = planes.rows // experts

    def __getitem__(self, expert: int) -> PlanesProduct:
        """The product by one of them."""
        return PlanesProduct(self.planes.matrix(expert, self._channels), self.dtype)

    def plan(self, places: torch.Tensor) -> Plan:
        """The plan for slots [slots] that name their expert."""
        return plan_of(places, self._experts)

    def __call__(self, rows: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Slots [slots, channels] of rows [tokens or slots, columns]; zeros where a slot names no expert."""
        slots = len(plan.slots)
        out = rows.new_zeros(slots, self._channels)
        if not slots:
            return out
        grid = triton.cdiv(self._channels, plan.tile.channels), len(plan.tiles), 1
        product_kernel[grid](
            out,
            rows,
            *self.planes.tensors,
            plan.slots,
            plan.tiles,
            slots,
            1,
            self._channels,
            self.planes.columns // GROUP,
            SHARED=slots // len(rows),
            **self.planes.constants,
            **plan.tile.options,
        )
        return out

"""Puts weights in blocks on a GPU, once the kernels are proved there with weights of their scheme."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch.nn import functional

from engine.closeness import REORDERED_SUMS, ROUNDING, difference
from engine.device.cuda_health import DeviceError, device_errors
from engine.packed.modules import Stored
from engine.packed.schemes import Blocks
from engine.packed_triton.grouped import PlanesStack
from engine.packed_triton.planes import Planes, planes_of
from engine.packed_triton.products import PlanesProduct
from engine.packed_triton.tiles import FEW_ROWS, TILES

_log = logging.getLogger(__name__)

_PROVED = 64
"""Channels of a matrix that are compared."""
_SLOTS = (1, 20, 40)  # two to a row
_ROWS = (1, *(tile.rows for tile in TILES), FEW_ROWS + 1)


class Matrices:
    """``OnDevice`` for one load of a model whose numbers are of the type ``dtype``.

    A scheme is proved with the first of its weights: what the kernels compute is compared with torch's products of the
    numbers that the reference unpacks. A scheme that is not proved is unpacked, as the log says.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._made: dict[Stored, PlanesProduct | None] = {}
        self._proved: dict[tuple[str, bool], bool] = {}

    def __call__(self, blocks: Blocks, _name: str = "", /) -> PlanesProduct | None:
        """The matrix of blocks [channels, bytes of a row]."""
        planes = self._planes_of(blocks, self._prove_matrix)
        return None if planes is None else PlanesProduct(planes, self._dtype, blocks.order)

    def matrix_of(self, stored: Stored) -> PlanesProduct | None:
        """The matrix of a weight, the same for all that share it."""
        if stored not in self._made:
            blocks = stored.blocks()
            self._made[stored] = None if blocks is None else self(blocks)
        return self._made[stored]

    def stack_of(self, stored: Stored) -> PlanesStack | None:
        """The matrices of experts [experts, channels, bytes of a row]."""
        blocks = stored.blocks()
        planes = None if blocks is None else self._planes_of(blocks, self._prove_stack)
        return None if blocks is None or planes is None else PlanesStack(planes, len(blocks.data), self._dtype)

    def _planes_of(self, blocks: Blocks, prove: Callable[[Planes, torch.Tensor], str]) -> Planes | None:
        name, few = blocks.scheme.name, blocks.data.flatten(0, -2)[:_PROVED]
        key = name, blocks.data.dim() == 3
        if not self._proved.get(key, True):
            return None
        planes = planes_of(blocks, self._device)
        if planes is None or self._proved.get(key):
            return planes
        part, numbers = planes.matrix(0, len(few)), Blocks(few.to(self._device), blocks.scheme).unpacked()
        try:
            with torch.inference_mode(), device_errors(self._device):
                problem = self._prove_numbers(part, numbers) or prove(part, numbers)
        except DeviceError as error:
            problem = str(error)
        self._proved[key] = not problem
        if not problem:
            return planes
        times = self._dtype.itemsize * blocks.scheme.columns / blocks.scheme.block_bytes
        kind = str(self._dtype).removeprefix("torch.")
        what = f"Weights in {name} are unpacked to {kind}, which takes {times:.1f} times their memory"
        _log.warning("%s and is slower: %s", what, problem)
        return None

    def _prove_numbers(self, planes: Planes, numbers: torch.Tensor) -> str:
        found = PlanesProduct(planes, self._dtype)
        chosen = torch.arange(len(numbers), device=self._device).flip(0)
        limit = ROUNDING[self._dtype]
        apart = difference(found.unpacked(self._dtype), numbers.to(self._dtype))
        apart = max(apart, difference(found.rows(chosen), numbers.to(self._dtype)[chosen]))
        return "" if apart <= limit else _told("unpacked numbers", apart, limit)

    def _prove_matrix(self, planes: Planes, numbers: torch.Tensor) -> str:
        product, weight = PlanesProduct(planes, self._dtype), numbers.to(self._dtype)
        apart, limit = 0.0, REORDERED_SUMS[self._dtype]
        for count in _ROWS:
            rows = self._rows(count, planes.columns)
            apart = max(apart, difference(product(rows), functional.linear(rows, weight)))
        return "" if apart <= limit else _told("products", apart, limit)

    def _prove_stack(self, planes: Planes, numbers: torch.Tensor) -> str:
        """Of two experts, each of which has half of the channels."""
        experts = 1 + (planes.rows % 2 == 0)
        stack = PlanesStack(planes, experts, self._dtype)
        weights = numbers.to(self._dtype).view(experts, -1, planes.columns)
        apart, limit = 0.0, REORDERED_SUMS[self._dtype]
        for count in _SLOTS:
            rows, places = self._rows(count, planes.columns), torch.arange(2 * count, device=self._device) % experts
            all_of_them = torch.stack([functional.linear(rows, weight) for weight in weights])
            expected = all_of_them[places, torch.arange(2 * count, device=self._device) // 2]
            apart = max(apart, difference(stack(rows, stack.plan(places)), expected))
        return "" if apart <= limit else _told("products of experts", apart, limit)

    def _rows(self, count: int, columns: int) -> torch.Tensor:
        rows = torch.randn(count, columns, generator=torch.Generator().manual_seed(0))
        return rows.to(self._device, self._dtype)


def _told(what: str, apart: float, limit: float) -> str:
    return f"{what} differ by {apart:.1e} of the largest number; rounding explains {limit:.0e}"

"""Products of linear layers with few rows, as decodes of few sequences have: a kernel of ours where it is faster.

Such a product only reads weights. For large ones torch's libraries come close to the memory's bandwidth, for small ones
not always, and on each device in other cases: so both are timed at load, shape by shape.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from engine.closeness import REORDERED_SUMS, difference
from engine.fused.kernels import few_rows_kernel
from engine.fused.linear import FirstLinear, is_plain
from engine.model.loader import LoadedModel
from engine.runner.cuda_graphs import CudaRecorder

_log = logging.getLogger(__name__)

ROWS = (1, 2, 4)
"""How many rows the kernel takes."""

_WINS = 0.95  # of torch's time: a smaller gain may be noise, and each start should choose alike
_WORTHWHILE = 1 << 20
_TIMED, _ROUNDS = 16, 7
_WARPS = 4
_BLOCK = 256 * _WARPS  # 16 bytes for each thread


class Product(NamedTuple):
    """The weights of a linear layer: [outputs, inputs], and [outputs]."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ProductPlace:
    """A linear layer, or the first of a group that is computed as one, and the numbers of rows to replace."""

    layer: nn.Module
    product: Product
    rows: frozenset[int]


def faster_rows(products: Sequence[Product]) -> frozenset[int]:
    """The numbers of rows for which the kernel beats torch on these products of one shape.

    None but on a GPU, and none for weights so small that a product takes no longer than its launch. Several are timed
    in turns, because a cache may hold a single one.
    """
    weight = products[0].weight
    if weight.device.type != "cuda" or weight.nbytes < _WORTHWHILE:
        return frozenset()
    found = set()
    for rows in ROWS:
        source = torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
        replays = []
        for multiply in (few_rows_linear, functional.linear):

            def compute(multiply: Callable[..., torch.Tensor] = multiply, source: torch.Tensor = source) -> None:
                for product in products[:_TIMED]:
                    multiply(source, *product)

            replays.append(CudaRecorder()(compute))
        ours: list[float] = []
        torchs: list[float] = []
        for _ in range(_ROUNDS):
            for replay, times in zip(replays, (ours, torchs), strict=True):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                replay()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
        share = median(ours) / median(torchs)
        _log.info("%d rows, %d x %d weights: %.2f of the time of torch", rows, *weight.shape, share)
        if share < _WINS:
            found.add(rows)
    return frozenset(found)


class SpeedFewRows:
    """The ``Rewrite`` of linear layers for steps of few rows. ``faster`` decides for all products of one shape."""

    name = "linears with few rows"
    tolerance = REORDERED_SUMS

    def __init__(self, faster: Callable[[Sequence[Product]], frozenset[int]] = faster_rows) -> None:
        self._faster = faster

    def find(self, model: LoadedModel) -> list[ProductPlace]:
        """The linear layers of the shapes for which the kernel is faster."""
        shapes: dict[object, list[tuple[nn.Module, Product]]] = defaultdict(list)
        for layer in model.module.modules():
            if isinstance(layer, FirstLinear):
                product = Product(layer.joined.weight, layer.joined.bias)
            elif is_plain(layer):
                product = Product(layer.weight, layer.bias)
            else:
                continue
            shapes[product.weight.shape, product.weight.dtype, product.bias is None].append((layer, product))
        places = []
        with torch.inference_mode():
            for members in shapes.values():
                rows = self._faster([product for _, product in members])
                places += [ProductPlace(layer, product, rows) for layer, product in members if rows]
        return places

    def stand_ins(self, place: ProductPlace) -> list[FewRowsLinear]:
        return [FewRowsLinear(place.product, place.rows)]

    def compare(self, place: ProductPlace, stand_in: FewRowsLinear) -> tuple[float, torch.dtype]:
        weight, bias = place.product
        numbers = torch.randn(max(ROWS), weight.shape[1], generator=torch.Generator().manual_seed(0))
        source = numbers.to(weight.device, weight.dtype)
        with torch.inference_mode():
            apart = [
                difference(stand_in(source[:rows]), functional.linear(source[:rows], weight, bias))
                for rows in place.rows
            ]
        return max(apart), weight.dtype

    def swap(self, place: ProductPlace, stand_in: FewRowsLinear) -> None:
        if isinstance(place.layer, FirstLinear):
            place.layer.joined.multiply = stand_in
        else:
            place.layer.forward = stand_in


class FewRowsLinear:
    """A linear layer by our kernel for some numbers of rows, by torch for all others."""

    def __init__(self, product: Product, rows: frozenset[int]) -> None:
        self._product = product
        self._rows = rows

    def __call__(self, source: torch.Tensor) -> torch.Tensor:
        multiply = few_rows_linear if source.shape[:-1].numel() in self._rows else functional.linear
        return multiply(source, *self._product)


def few_rows_linear(source: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``torch.nn.functional.linear`` of ``source`` [..., inputs] with a number of rows of ``ROWS``."""
    outputs, inputs = weight.shape
    rows = source.shape[:-1].numel()
    out = torch.empty(*source.shape[:-1], outputs, dtype=source.dtype, device=source.device)
    # More outputs in a program read ``source`` less often; the sums of 4 rows leave registers for 2.
    block = next(size for size in (4, 2, 1) if outputs % size == 0 and rows * size <= 8)
    few_rows_kernel[(outputs // block,)](
        out,
        source.contiguous(),
        weight,
        weight if bias is None else bias,
        inputs,
        outputs,
        ROWS=rows,
        OUTPUTS=block,
        BLOCK=_BLOCK,
        WHOLE=inputs % _BLOCK == 0,
        BIASED=bias is not None,
        num_warps=_WARPS,
    )
    return out

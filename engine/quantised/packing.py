"""Digits and their scales become blocks of our own, or numbers where no scheme holds them.

A matrix is made a run of rows at a time: what is made on the way is never as large as a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from engine.packed.published_schemes import F8_32, F8_128, I4_32, I4_128, I8_32, I8_128
from engine.packed.schemes import CHUNK, Blocks, Scheme, half_power
from engine.quantised.settings import damaged

Digits = Callable[[slice], torch.Tensor]
"""Some rows of a matrix, those of a stack end to end: what each number is before its scale, [rows, columns]."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Digits of one sort: the schemes that hold them, the widest blocks first, and how they are stored in one.

    ``stored`` makes bytes [blocks, bytes] of digits [blocks, columns of a block].
    """

    schemes: tuple[Scheme, ...]
    has_zeros: bool
    stored: Callable[[torch.Tensor], torch.Tensor]


def _as_bytes(digits: torch.Tensor) -> torch.Tensor:
    return digits.view(torch.uint8)


def as_nibbles(digits: torch.Tensor) -> torch.Tensor:
    """Digits [blocks, columns] below 16 in half as many bytes: of each 32, column j is with column j + 16."""
    pairs = digits.view(len(digits), -1, 2, 16)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).view(len(digits), -1)


FP8 = Kind((F8_128, F8_32), False, _as_bytes)
INT8 = Kind((I8_128, I8_32), True, _as_bytes)
INT4 = Kind((I4_128, I4_32), True, as_nibbles)


@dataclass(frozen=True, slots=True)
class Grid:
    """What the numbers of a block of ``height`` rows and ``width`` columns share, for matrices of ``rows`` above one
    another: ``values`` [blocks of rows of all matrices, blocks of columns]. The last blocks of a matrix may be cut."""

    values: torch.Tensor
    height: int
    width: int
    rows: int

    def share(self, columns: int, step: int) -> bool:
        """Whether every ``step`` columns share a value."""
        return self.width % step == 0 or self.width >= columns

    def of(self, rows: slice, columns: int, step: int = 1) -> torch.Tensor:
        """The values of some rows, one for each ``step`` columns: [rows, columns / step]."""
        row = torch.arange(rows.start, rows.stop)
        block = row // self.rows * -(-self.rows // self.height) + row % self.rows // self.height
        values = self.values.index_select(0, block)
        if self.values.shape[1] == 1:
            return values.expand(-1, columns // step)
        return values.index_select(1, torch.arange(0, columns, step) // self.width)


def rows_of(method: str, weight: torch.Tensor) -> torch.Tensor:
    """The rows [rows, columns] of a stored weight [..., rows, columns], those of a stack end to end."""
    if weight.ndim < 2 or not weight.numel():
        raise damaged(method, f"a weight is {list(weight.shape)}")
    return weight.reshape(-1, weight.shape[-1])


def grid_of(
    method: str, values: torch.Tensor, shape: Sequence[int], blocks: Sequence[tuple[int, int]] = (), what: str = "scale"
) -> Grid:
    """Values of a weight [..., rows, columns], one for the matrix, for a row or for a block, by their shape.

    ``blocks`` are the sizes that the settings name, in rows and columns; where none fits, all have one size.
    """
    if values.is_complex() or values.dtype == torch.bool:
        raise damaged(method, f"{what}s are {values.dtype}")
    *stack, rows, columns = shape
    count = math.prod(stack)
    stacked = values.ndim >= 2 and [*values.shape[:-2]] == stack and values.numel() > 0
    high, wide = values.shape[-2:] if stacked else (0, 0)
    for height, width in blocks if stacked else ():
        if (-(-rows // height), -(-columns // width)) == (high, wide):
            return Grid(values.reshape(-1, wide), height, width, rows)
    if values.numel() in (1, count):
        return Grid(values.reshape(-1, 1).expand(count, 1), rows, columns, rows)
    if list(values.shape) in ([*stack, rows], [*stack, rows, 1]):
        return Grid(values.reshape(-1, 1), 1, columns, rows)
    if stacked and rows % high == 0 and columns % wide == 0:
        return Grid(values.reshape(-1, wide), rows // high, columns // wide, rows)
    raise damaged(method, f"{what} {list(values.shape)} does not fit a weight {list(shape)}")


def scales_of(method: str, scale: torch.Tensor, shape: Sequence[int], blocks: Sequence[tuple[int, int]] = ()) -> Grid:
    """``grid_of`` for scales, which become float32. In bytes they are powers of two (E8M0)."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        scale = 2 * half_power(scale.view(torch.uint8))
    if not scale.is_floating_point():
        raise damaged(method, f"scales are {scale.dtype}")
    scale = scale.float()
    if not scale.isfinite().all():
        raise damaged(method, "a scale is no finite number")
    return grid_of(method, scale, shape, blocks)


def packed(
    kind: Kind,
    shape: Sequence[int],
    digits: Digits,
    scale: Grid,
    zero: Grid | int = 0,
    order: torch.Tensor | None = None,
) -> Blocks | torch.Tensor:
    """The weight (digits - zero) * scale of ``shape`` [..., rows, columns], in float32.

    In blocks where one size divides the columns and no block has two scales or zeros, and where zeros are integers of
    a signed byte. ``order`` is that of ``Blocks``.
    """
    rows, columns = math.prod(shape[:-1]), shape[-1]
    zeros = zero if isinstance(zero, Grid) else Grid(torch.full((1, 1), zero), rows, columns, rows)
    known = zeros.values.float()
    fits = bool(((known >= -128) & (known <= 127) & (known == known.round())).all())
    for scheme in kind.schemes:
        step = scheme.columns
        if fits and columns % step == 0 and scale.share(columns, step) and zeros.share(columns, step):
            data = torch.empty(rows, scheme.row_bytes(columns), dtype=torch.uint8)
            for part in runs(rows, columns):
                block = [bytes_of(scale.of(part, columns, step)).view(-1, 4)]
                if kind.has_zeros:
                    block.append(bytes_of(zeros.of(part, columns, step).to(torch.int8)).view(-1, 1))
                block.append(kind.stored(digits(part).reshape(-1, step)))
                data[part] = torch.cat(block, dim=1).view(-1, data.shape[1])
            return Blocks(data.view(*shape[:-1], -1), scheme, order)
    numbers = torch.empty(rows, columns)
    for part in runs(rows, columns):
        found = (digits(part).float() - zeros.of(part, columns)) * scale.of(part, columns)
        if order is None:
            numbers[part] = found
        else:
            numbers[part, order] = found
    return numbers.view(*shape)


def bytes_of(values: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor, end to end."""
    return values.contiguous().reshape(-1).view(torch.uint8)


def runs(rows: int, columns: int) -> Iterator[slice]:
    """All rows in runs of about ``CHUNK`` numbers, which begin at multiples of eight."""
    together = max(8, CHUNK // max(1, columns) // 8 * 8)
    return (slice(first, min(first + together, rows)) for first in range(0, rows, together))


def bits_of(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Digits [rows, columns] of words [rows, words]: a stream of ``bits`` each, the first in the lowest."""
    stream = bytes_of(words).view(len(words), -1)
    if bits == 8:
        return stream[:, :columns]
    if bits == 4:
        return torch.stack([stream & 15, stream >> 4], dim=2).flatten(1)[:, :columns]
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % bits)).view(len(stream), -1, bits)
    eight = (stream.long() << 8 * torch.arange(bits)).sum(dim=2, keepdim=True)  # so many bytes are eight digits
    return (eight >> bits * torch.arange(8) & (1 << bits) - 1).to(torch.uint8).flatten(1)[:, :columns]


def order_of(method: str, group_of: torch.Tensor, groups: int) -> torch.Tensor | None:
    """How columns are gathered so that those of a group lie together, by the group of each: None if they already do.

    Groups of different sizes are refused.
    """
    if group_of.is_floating_point() or group_of.is_complex():
        raise damaged(method, f"g_idx is {group_of.dtype}")
    group_of = group_of.long()
    if group_of.min() < 0 or group_of.max() >= groups:
        raise damaged(method, f"g_idx names groups beyond the {groups} that have scales")
    sizes = group_of.bincount(minlength=groups)
    if (sizes[1:-1] != sizes[0]).any() or sizes[-1] > sizes[0]:
        raise damaged(method, "groups in g_idx differ in size")
    if (group_of.diff() >= 0).all():
        return None
    return group_of.argsort(stable=True)

"""Weights in blocks, laid out for a GPU: digits apart from scales, each in planes that programs read end to end.

Blocks of a file are 17 or 210 bytes, which a GPU can read byte by byte only. Planes take as many bytes in all. A group
of 32 columns has its digits in as many words as a digit has bits: column ``words * n + w`` is at place n of word w, so
that a thread reads the digits of a group at once, and one place of all words belongs to columns side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from engine.packed.schemes import CHUNK, Blocks, Scheme, nibbles

GROUP = 32
"""Columns whose digits lie together."""


class Parts(NamedTuple):
    """Some blocks, taken apart: digits [blocks, columns], and the numbers of each block in planes of their own."""

    digits: torch.Tensor
    scales: torch.Tensor
    fine: torch.Tensor | None = None
    more: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """How the planes of a scheme are read: the constants of the kernels, and what takes blocks apart."""

    parts: Callable[[torch.Tensor], Parts]
    scale: str
    """What a scale is made of: see ``_scales_of`` in the kernels."""
    bits: int = 4
    high: int = 0
    """Bits of a digit beyond those, in a plane of their own."""
    offset: int = 0
    """What digits count from, less what a block says."""
    number: str = "integer"
    """What a digit is: ``integer``, ``fp4`` or ``fp8``."""
    span: int = 1
    """Groups that share a number of the plane of scales."""
    halves: bool = False
    """Whether 16 columns have a scale."""

    @property
    def constants(self) -> dict[str, Any]:
        """The kernels' constants."""
        return {
            "NUMBER": self.number, "SCALE": self.scale, "SPAN": self.span, "HALVES": self.halves,
            "BITS": self.bits, "HIGH": self.high, "OFFSET": self.offset,
        }  # fmt: skip


@dataclass(slots=True)
class Planes:
    """Matrices [experts × rows, columns] in the planes of a layout, on a device."""

    layout: Layout
    rows: int
    columns: int
    digits: torch.Tensor
    high: torch.Tensor
    scales: torch.Tensor
    fine: torch.Tensor
    more: torch.Tensor
    constants: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.constants = self.layout.constants

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """As the kernels take them. What a scheme lacks is any tensor, and never read."""
        return self.digits, self.high, self.scales, self.fine, self.more

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(size for size in {tensor.data_ptr(): tensor.nbytes for tensor in self.tensors}.values())

    def matrix(self, number: int, rows: int) -> Planes:
        """One of the matrices of ``rows`` each, in the same memory."""
        own = slice(number * rows, number * rows + rows)
        return Planes(self.layout, rows, self.columns, *(tensor[own] for tensor in self.tensors))


def knows(scheme: Scheme, shape: tuple[int, ...]) -> bool:
    """Whether the kernels multiply by matrices [..., channels, columns] in the blocks of a scheme."""
    return scheme.name in LAYOUTS and len(shape) > 1 and shape[-1] % GROUP == 0


def planes_of(blocks: Blocks, device: torch.device) -> Planes | None:
    """The planes of blocks [..., rows, bytes of a row] on a device; None for what the kernels do not know."""
    if not blocks.data.numel() or not knows(blocks.scheme, blocks.shape):
        return None
    layout, columns = LAYOUTS[blocks.scheme.name], blocks.shape[-1]
    data = blocks.data.flatten(0, -2)
    rows = len(data)
    planes: list[torch.Tensor] = []
    together = max(1, CHUNK // columns)
    for first in range(0, rows, together):
        chunk = data[first : first + together].to(device)
        parts = layout.parts(chunk.reshape(-1, blocks.scheme.block_bytes))
        if not _computable(parts, layout):
            return None
        found = [plane for plane in _in_planes(parts, layout, len(chunk)) if plane is not None]
        if not planes:
            planes = [torch.empty(rows, *plane.shape[1:], dtype=plane.dtype, device=device) for plane in found]
        for whole, plane in zip(planes, found, strict=True):
            whole[first : first + len(chunk)] = plane
    return Planes(layout, rows, columns, *_named(planes, layout))


def _computable(parts: Parts, layout: Layout) -> bool:
    """Whether there is none of what the kernels compute otherwise, and no model that works has in its weights.

    That is what E4M3 keeps for no number, and powers of two above 2 ** 112, which they multiply by 2 ** 15.
    """
    if layout.number == "fp8":
        return bool(((parts.digits & 127) != 127).all())
    return layout.scale != "power" or bool((parts.scales <= 127 + 112).all())


def _in_planes(parts: Parts, layout: Layout, rows: int) -> Iterator[torch.Tensor | None]:
    digits = parts.digits.reshape(rows, -1, GROUP // layout.bits, layout.bits)  # row, group, place, word
    yield _packed(digits & ((1 << layout.bits) - 1), layout.bits, torch.int32)
    if layout.high:
        yield _packed(digits >> layout.bits, layout.high, torch.int16 if layout.high == 2 else torch.uint8)
    for plane in (parts.scales, parts.fine, parts.more):
        yield None if plane is None else plane.reshape(rows, -1)


def _packed(digits: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Words [..., words] of digits [..., places, words] of ``bits`` each, the first in the lowest bits."""
    places = digits.shape[-2]
    shifts = bits * torch.arange(places, dtype=torch.int64, device=digits.device)
    words = (digits.to(torch.int64) << shifts[:, None]).sum(-2)
    if dtype == torch.uint8:
        return words.to(dtype)
    size = 8 * dtype.itemsize
    return torch.where(words >= 1 << (size - 1), words - (1 << size), words).to(dtype)


def _named(planes: list[torch.Tensor], layout: Layout) -> Iterator[torch.Tensor]:
    """Digits, high digits, scales, fine ones, and more; digits for those that a layout has not."""
    rest = iter(planes)
    digits = next(rest)
    yield digits
    yield next(rest) if layout.high else digits
    for _ in range(3):
        yield next(rest, digits)


# --- Blocks taken apart --------------------------------------------------------------------------


def _halves(blocks: torch.Tensor, start: int, count: int = 1) -> torch.Tensor:
    return blocks[:, start : start + 2 * count].contiguous().view(torch.float16)


def _floats(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, :4].contiguous().view(torch.float32)


def _of_runs(blocks: torch.Tensor, run: int = 16) -> torch.Tensor:
    """Nibbles of runs of bytes: the low ones of a run, then its high ones."""
    return nibbles(blocks.reshape(-1, run)).view(len(blocks), -1)


def _fifth(blocks: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
    """Digits with the bits of four bytes on top."""
    places = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return digits | (((blocks[:, :, None] >> places) & 1).flatten(1) << 4)


def _q4_0(blocks: torch.Tensor) -> Parts:
    return Parts(_of_runs(blocks[:, 2:]), _halves(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> Parts:
    return Parts(_of_runs(blocks[:, 4:]), _halves(blocks, 0), -_halves(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> Parts:
    return Parts(_fifth(blocks[:, 2:6], _of_runs(blocks[:, 6:])), _halves(blocks, 0))


def _q5_1(blocks: torch.Tensor) -> Parts:
    return Parts(_fifth(blocks[:, 4:8], _of_runs(blocks[:, 8:])), _halves(blocks, 0), -_halves(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> Parts:
    return Parts(blocks[:, 2:] ^ 128, _halves(blocks, 0))


def _pairs(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Six bits of a scale and of a least value for each 32 of 256 columns, which ggml keeps in 12 bytes.

    In eight bytes the scale with two bits of the least value above it, in four its other four bits, two to a byte.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=1)
    least = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=1)
    high = least >> 2
    return scale | ((least & 3) << 6), high[:, 0::2] | (high[:, 1::2] << 4)


def _q4_k(blocks: torch.Tensor) -> Parts:
    return Parts(_of_runs(blocks[:, 16:], 32), _halves(blocks, 0, 2), *_pairs(blocks))


def _q5_k(blocks: torch.Tensor) -> Parts:
    places = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = ((blocks[:, None, 16:48] >> places) & 1).flatten(1) << 4
    return Parts(_of_runs(blocks[:, 48:], 32) | fifth, _halves(blocks, 0, 2), *_pairs(blocks))


def _q6_k(blocks: torch.Tensor) -> Parts:
    low = _of_runs(blocks[:, :128], 64)
    places = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)[:, None]
    high = ((blocks[:, 128:192].reshape(-1, 2, 1, 32) >> places) & 3).flatten(1)
    return Parts(low | (high << 4), _halves(blocks, 208), blocks[:, 192:208].contiguous().view(torch.int8))


def _mxfp4(blocks: torch.Tensor) -> Parts:
    return Parts(_of_runs(blocks[:, 1:]), blocks[:, :1])


def _i4(blocks: torch.Tensor) -> Parts:
    return Parts(_of_runs(blocks[:, 5:]), _floats(blocks), blocks[:, 4:5].contiguous().view(torch.int8))


def _i8(blocks: torch.Tensor) -> Parts:
    return Parts(blocks[:, 5:] ^ 128, _floats(blocks), blocks[:, 4:5].contiguous().view(torch.int8))


def _f8(blocks: torch.Tensor) -> Parts:
    return Parts(blocks[:, 4:], _floats(blocks))


def _nvfp4(blocks: torch.Tensor) -> Parts:
    return Parts(_of_runs(blocks[:, 8:]), _floats(blocks), blocks[:, 4:8])


LAYOUTS = {
    "Q4_0": Layout(_q4_0, "one", offset=8),
    "Q4_1": Layout(_q4_1, "least"),
    "Q5_0": Layout(_q5_0, "one", high=1, offset=16),
    "Q5_1": Layout(_q5_1, "least", high=1),
    "Q8_0": Layout(_q8_0, "one", bits=8, offset=128),
    "Q4_K": Layout(_q4_k, "pairs", span=8),
    "Q5_K": Layout(_q5_k, "pairs", high=1, span=8),
    "Q6_K": Layout(_q6_k, "sixteens", high=2, offset=32, span=8, halves=True),
    "MXFP4": Layout(_mxfp4, "power", number="fp4"),
    "NVFP4": Layout(_nvfp4, "float8", number="fp4", span=2, halves=True),
    "I4_128": Layout(_i4, "zero", span=4),
    "I4_32": Layout(_i4, "zero"),
    "I8_128": Layout(_i8, "zero", bits=8, offset=128, span=4),
    "I8_32": Layout(_i8, "zero", bits=8, offset=128),
    "F8_128": Layout(_f8, "one", bits=8, number="fp8", span=4),
    "F8_32": Layout(_f8, "one", bits=8, number="fp8"),
}
"""By the name of a scheme: those that the kernels know."""

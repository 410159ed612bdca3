"""Schemes of quantised weights: how many numbers a block holds, in how many bytes, and which numbers they are.

The numbers are those of the ``gguf`` package, bit for bit: its order of float32 operations (gguf-py, ``quants.py``; the
structures are ggml's, ``ggml-common.h``). Most are unpacked by transformers' torch code, which keeps that order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.integrations.gguf.dequant import GGML_BLOCK, GGML_NAME, dequantize

# Numbers that are unpacked at once: what is made on the way is several times as large.
CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Scheme:
    """``columns`` numbers of a row in ``block_bytes`` bytes; ``unpack`` makes them of bytes [blocks, block_bytes]."""

    name: str
    columns: int
    block_bytes: int
    unpack: Callable[[torch.Tensor], torch.Tensor]

    def row_bytes(self, columns: int) -> int:
        return columns // self.columns * self.block_bytes


@dataclass(frozen=True, slots=True)
class Blocks:
    """A weight in blocks: ``data``, bytes [..., rows, bytes of a row], each row a whole number of blocks.

    ``order`` [columns], where it is set, says that the input must be gathered so before it meets the columns.
    """

    data: torch.Tensor
    scheme: Scheme
    order: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def shape(self) -> torch.Size:
        """The shape of the numbers."""
        columns = self.data.shape[-1] // self.scheme.block_bytes * self.scheme.columns
        return torch.Size((*self.data.shape[:-1], columns))

    def unpacked(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The numbers [..., rows, columns], rounded to ``dtype``, in the order of the model's own columns."""
        rows = self.data.reshape(-1, self.data.shape[-1])
        columns = self.shape[-1]
        numbers = torch.empty(len(rows), columns, dtype=dtype, device=rows.device)
        together = max(1, CHUNK // columns)
        for first in range(0, len(rows), together):
            blocks = rows[first : first + together].reshape(-1, self.scheme.block_bytes)
            numbers[first : first + together] = self.scheme.unpack(blocks).view(-1, columns)
        if self.order is not None:
            numbers[:, self.order] = numbers.clone()
        return numbers.view(self.shape)

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """The numbers of some rows of a matrix, in float32: [len(numbers), columns]."""
        return Blocks(self.data.index_select(0, numbers), self.scheme, self.order).unpacked()


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Column j in the low four bits of byte j, column j + 16 in the high ones."""
    return torch.cat([packed & 15, packed >> 4], dim=1)


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """Bit j of four bytes belongs to column j, as 16 or 0."""
    bits = packed.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits.flatten(1) & 1) << 4


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    """ggml's block_q5_0: half-precision scale, 32 fifth bits, 32 nibbles; digits count from -16."""
    digits = (nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])).to(torch.int8) - 16
    return _half(blocks, 0) * digits.float()


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    """ggml's block_q5_1: half-precision scale and least value, 32 fifth bits, 32 nibbles."""
    digits = nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * digits.float() + _half(blocks, 2)


# Twice what FP4 stands for: sign, two bits of exponent, one of mantissa (OCP Microscaling Formats, E2M1).
TWICE_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def half_power(exponents: torch.Tensor) -> torch.Tensor:
    """Half of the power of two that a byte stands for (E8M0: 2 ** (byte - 127)), also where that is subnormal."""
    bits = exponents.to(torch.int32)
    return torch.where(bits < 2, 0x00200000 << bits, (bits - 1) << 23).view(torch.float32)


def _mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    """ggml's block_mxfp4: a power of two, 32 nibbles that stand for FP4."""
    table = torch.tensor(TWICE_FP4, dtype=torch.float32, device=blocks.device)
    return half_power(blocks[:, :1]) * table[nibbles(blocks[:, 1:]).long()]


def _by_transformers(kind: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda blocks: dequantize(blocks, kind).view(len(blocks), -1)


SCHEMES = {
    **{
        kind: Scheme(GGML_NAME[kind], columns, size, _by_transformers(kind))
        for kind, (columns, size) in GGML_BLOCK.items()
    },
    6: Scheme("Q5_0", 32, 22, _q5_0),
    7: Scheme("Q5_1", 32, 24, _q5_1),
    39: Scheme("MXFP4", 32, 17, _mxfp4),
}
"""By ggml's number of the type (ggml.h, ``enum ggml_type``)."""

BY_NAME = {scheme.name: scheme for scheme in SCHEMES.values()}

"""FP4 (E2M1): MXFP4, in which gpt-oss is published, and what other methods store of it and of NVFP4."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from engine.packed.published_schemes import NVFP4
from engine.packed.schemes import BY_NAME, TWICE_FP4, Blocks
from engine.quantised.names import grouped
from engine.quantised.packing import Kind, bits_of, bytes_of, packed, rows_of, runs, scales_of
from engine.quantised.settings import damaged

NUMBERS = Kind((), False, lambda digits: digits)
"""Digits that no scheme holds."""


class Mxfp4:
    """``…_blocks`` [experts, rows, groups, 16]: of each 32 columns, byte j holds 2j in the low bits and 2j + 1 in the
    high ones; ``…_scales`` [experts, rows, groups]: powers of two (OCP Microscaling Formats)."""

    name = "MXFP4"

    def grouped(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        endings = {"(.+)_blocks": (r"\1", "blocks"), "(.+)_scales": (r"\1", "scales")}
        return grouped(self.name, names, endings, ("blocks", "scales"))

    def read(self, parts: Mapping[str, torch.Tensor]) -> Blocks | torch.Tensor:
        pairs = parts["blocks"]
        if pairs.ndim < 3 or pairs.shape[-1] != 16:
            raise damaged(self.name, f"blocks are {list(pairs.shape)}, not [..., rows, groups, 16]")
        return mxfp4(self.name, pairs.flatten(-2), parts["scales"])


def mxfp4(method: str, pairs: torch.Tensor, scales: torch.Tensor) -> Blocks:
    """Of bytes [..., rows, columns / 2], each two neighbours, and exponents [..., rows, columns / 32]."""
    flat = _checked(method, pairs, scales, 32)
    if scales.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        raise damaged(method, f"scales are {scales.dtype}, not bytes")
    exponents = bytes_of(scales).view(-1, scales.shape[-1], 1)
    data = torch.empty(*exponents.shape[:2], 17, dtype=torch.uint8)
    for part in runs(len(flat), 2 * flat.shape[1]):
        data[part, :, :1] = exponents[part]
        data[part, :, 1:] = as_halves(flat[part]).view(-1, data.shape[1], 16)
    return Blocks(data.view(*pairs.shape[:-1], -1), BY_NAME["MXFP4"])


def nvfp4(method: str, pairs: torch.Tensor, scales: torch.Tensor, whole: torch.Tensor) -> Blocks | torch.Tensor:
    """Of bytes [..., rows, columns / 2], each two neighbours, FP8 scales [..., rows, columns / 16], and what all
    numbers of a matrix are multiplied by. The product of both scales is rounded to float32, then that with FP4."""
    flat = _checked(method, pairs, scales, 16)
    if scales.dtype != torch.float8_e4m3fn:
        raise damaged(method, f"scales are {scales.dtype}, not float8_e4m3fn")
    *stack, rows, half = pairs.shape
    shape = [*stack, rows, 2 * half]
    own = scales_of(method, whole, shape)
    if own.height != rows:
        raise damaged(method, f"the scale of a matrix is {list(whole.shape)}")
    groups = scales.reshape(-1, scales.shape[-1])
    if shape[-1] % NVFP4.columns:
        values = groups.float() * own.of(slice(0, len(flat)), 1)
        return packed(
            NUMBERS, shape, lambda part: numbers_of(flat[part]), scales_of(method, values.view(scales.shape), shape)
        )
    data = torch.empty(len(flat), 2 * half // 64, NVFP4.block_bytes, dtype=torch.uint8)
    for part in runs(len(flat), 2 * half):
        data[part, :, :4] = bytes_of(own.of(part, 1)).view(-1, 1, 4)
        data[part, :, 4:8] = bytes_of(groups[part]).view(-1, data.shape[1], 4)
        data[part, :, 8:] = as_halves(flat[part]).view(-1, data.shape[1], 32)
    return Blocks(data.view(*shape[:-1], -1), NVFP4)


def as_halves(pairs: torch.Tensor) -> torch.Tensor:
    """Bytes [rows, bytes] of neighbours, the first in the low bits, as nibbles in ggml's order."""
    first, second = pairs.view(len(pairs), -1, 2, 8).unbind(2)  # columns 0 to 15 of 32, and 16 to 31
    low, high = first & 15 | second << 4, first >> 4 | second & 0xF0
    return torch.stack([low, high], dim=3).view(len(pairs), -1)


def numbers_of(pairs: torch.Tensor) -> torch.Tensor:
    """What pairs of FP4 stand for: [rows, columns] in float32."""
    return torch.tensor(TWICE_FP4)[bits_of(pairs, 4, 2 * pairs.shape[1]).long()] / 2


def _checked(method: str, pairs: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    """The rows of pairs, as bytes."""
    if pairs.dtype not in (torch.uint8, torch.int8):
        raise damaged(method, f"packed numbers are {pairs.dtype}, not bytes")
    rows = rows_of(method, pairs)
    if 2 * pairs.shape[-1] % group or scales.shape != (*pairs.shape[:-1], 2 * pairs.shape[-1] // group):
        raise damaged(method, f"scales {list(scales.shape)} do not fit packed numbers {list(pairs.shape)}")
    return rows.view(torch.uint8)

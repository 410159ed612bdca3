"""Weight matrices as panels: 16 channels side by side, in the smallest format that represents the numbers exactly.

The formats are described in ``matmul.h``. Nothing is rounded: blocks of a GGUF file are only rearranged, and floats
become bfloat16 only if that loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

PANEL = 16
GROUP = 32
KINDS = ("Q4_0", "Q4_1", "Q8_0")
"""The types of GGUF blocks that become panels."""


class Format(IntEnum):
    """As the enumeration in ``matmul.h``."""

    Q4 = 0
    Q8 = 1
    BRAIN = 2
    FLOAT = 3


@dataclass(frozen=True, slots=True)
class Panels:
    """A matrix [channels, columns] as bytes [channels / 16, bytes of a panel]."""

    data: torch.Tensor
    format: Format


def fits(channels: int, columns: int) -> bool:
    """Whether a matrix has whole panels and whole groups."""
    return channels % PANEL == 0 and columns % GROUP == 0


def pack_floats(weight: torch.Tensor) -> Panels:
    """A float matrix, in half the space if all its numbers are bfloat16."""
    bits = weight.detach().float().contiguous().view(torch.int32)
    panels = bits.view(-1, PANEL, bits.shape[1]).transpose(1, 2).contiguous()  # [panels, columns, channels]
    if (bits & 0xFFFF).any():
        return Panels(panels.view(torch.uint8).flatten(1), Format.FLOAT)
    low, high = (panels >> 16).unflatten(1, (-1, 2)).unbind(2)
    return Panels(((low & 0xFFFF) | (high << 16)).contiguous().view(torch.uint8).flatten(1), Format.BRAIN)


def pack_blocks(blocks: torch.Tensor, kind: str) -> Panels:
    """Blocks of a GGUF file, bytes [channels, groups, bytes of a block], of the type Q4_0, Q4_1 or Q8_0.

    Their layout is that of ggml's block_q4_0, block_q4_1 and block_q8_0: half-precision scale, for Q4_1 the
    minimum, then the digits; of Q4, column j is in the low four bits of byte j and column j + 16 in the high ones.
    """
    panels = blocks.view(-1, PANEL, *blocks.shape[1:]).permute(0, 2, 3, 1)  # [panels, groups, bytes, channels]
    if kind == "Q8_0":
        words = panels[:, :, 2:].unflatten(2, (8, 4)).transpose(3, 4)
        return _joined([_halves(panels[:, :, :2]), words.flatten(2)], Format.Q8)
    scales = _halves(panels[:, :, :2])
    if kind == "Q4_1":
        least = _halves(panels[:, :, 2:4])
    else:  # Q4_0 counts its digits from -8
        least = (scales.contiguous().view(torch.float16) * -8).view(torch.uint8)
    low_high = panels[:, :, -GROUP // 2 :]
    digits = torch.cat([low_high & 15, low_high >> 4], dim=2)  # [panels, groups, columns, channels]
    even, odd = digits.unflatten(2, (-1, 2)).unbind(3)
    words = (even | (odd << 4)).unflatten(2, (4, 4)).transpose(3, 4)
    return _joined([scales, least, words.flatten(2)], Format.Q4)


def _halves(pairs: torch.Tensor) -> torch.Tensor:
    """Two bytes of each channel, [panels, groups, 2, channels], side by side."""
    return pairs.transpose(2, 3).flatten(2)


def _joined(parts: list[torch.Tensor], format: Format) -> Panels:
    return Panels(torch.cat(parts, dim=2).flatten(1).contiguous(), format)

"""Weight matrices as panels: 16 channels side by side, in the smallest format that represents the numbers exactly.

The formats are described in ``formats.h``. Nothing is rounded: blocks of a file are only rearranged, and floats become
bfloat16 only if that loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from engine.api.errors import ModelRefused
from engine.native.library import PANEL as PANEL
from engine.packed.schemes import BY_NAME

GROUP = 32
BYTES_TOGETHER = 1 << 20
"""How much of a matrix is rearranged at a time, which bounds the memory that it takes, and keeps it in a cache."""


class Format(IntEnum):
    """As the enumeration in ``formats.h``; those after the first two are named after schemes."""

    FLOAT = 0
    BRAIN = 1
    Q8_0 = 2
    Q4_0 = 3
    Q4_1 = 4
    Q5_0 = 5
    Q5_1 = 6
    IQ4_NL = 7
    MXFP4 = 8
    Q2_K = 9
    Q3_K = 10
    Q4_K = 11
    Q5_K = 12
    Q6_K = 13
    IQ4_XS = 14
    F8_128 = 15
    F8_32 = 16
    I8_128 = 17
    I8_32 = 18
    I4_128 = 19
    I4_32 = 20
    NVFP4 = 21
    NF4 = 22
    FP4 = 23
    IQ1 = 24
    IQ2 = 25
    IQ3_XXS = 26
    IQ3_S = 27


@dataclass(frozen=True, slots=True)
class Panels:
    """A matrix [channels, columns] as bytes [channels / 16, bytes of a panel]."""

    data: torch.Tensor
    format: Format


def whole(channels: torch.Tensor) -> torch.Tensor:
    """Whole panels of channels [channels, …]: missing ones are zero."""
    missing = -len(channels) % PANEL
    return torch.cat([channels, channels.new_zeros(missing, *channels.shape[1:])]) if missing else channels


def pack_floats(weight: torch.Tensor) -> Panels:
    """A float matrix, in half the space if all its numbers are bfloat16."""
    bits = weight.detach().float().contiguous().view(torch.int32)
    panels = bits.view(-1, PANEL, bits.shape[1]).transpose(1, 2).contiguous()  # [panels, columns, channels]
    if (bits & 0xFFFF).any():
        return Panels(panels.view(torch.uint8).flatten(1), Format.FLOAT)
    low, high = (panels >> 16).unflatten(1, (-1, 2)).unbind(2)
    return Panels(((low & 0xFFFF) | (high << 16)).contiguous().view(torch.uint8).flatten(1), Format.BRAIN)


def pack_blocks(blocks: torch.Tensor, kind: str) -> Panels:
    """Blocks, bytes [channels, blocks of a row, bytes of a block], of a scheme in ``KINDS``.

    Their layout is that of ggml's block_q4_0, block_q4_K and so on (ggml-common.h), or of ``published_schemes.py``.
    Raises ``ModelRefused`` for numbers in FP8 that are none.
    """
    panels = blocks.unflatten(0, (-1, PANEL))  # [panels, channels, blocks, bytes]
    size = blocks.shape[1] * bytes_in_panels(kind, blocks.shape[2])
    data = torch.empty(len(panels), PANEL * size, dtype=torch.uint8)
    together = max(1, BYTES_TOGETHER // panels[0].numel())
    for some, packed in zip(panels.split(together), data.split(together), strict=True):
        if kind == "BF16":  # a block is one number: words of two, as they are
            pairs = some.reshape(len(some), PANEL, -1, 4).transpose(1, 2)
            packed.copy_(pairs.reshape(len(some), -1))
            continue
        planes = some.permute(3, 0, 2, 1).contiguous()  # [bytes, panels, blocks, channels]
        torch.cat([part.flatten(2) for part in _PARTS[kind](planes)], 2, out=packed.unflatten(1, (blocks.shape[1], -1)))
    return Panels(data, format_of(kind))


def bytes_in_panels(kind: str, block_bytes: int) -> int:
    """What a block of a scheme, of so many bytes, takes in panels."""
    return _BLOCK_BYTES.get(format_of(kind), block_bytes)


def format_of(kind: str) -> Format:
    """What the blocks of a scheme in ``KINDS`` become."""
    return _OTHER_FORMATS[kind] if kind in _OTHER_FORMATS else Format[kind]


def _side_by_side(part: torch.Tensor) -> torch.Tensor:
    """Numbers [count, panels, blocks, channels] as bytes [panels, blocks, count, channels * bytes of a number]."""
    return part.permute(1, 2, 0, 3).contiguous().view(torch.uint8)


def _halves(planes: torch.Tensor) -> torch.Tensor:
    """Bytes [2 * count, ...] of numbers of 16 bits, side by side."""
    return _numbers(planes, 2)


def _numbers(planes: torch.Tensor, size: int) -> torch.Tensor:
    """Bytes [size * count, ...] of numbers of so many bytes, side by side."""
    return planes.unflatten(0, (-1, size)).permute(2, 3, 0, 4, 1).flatten(3)  # [panels, blocks, count, channels * size]


def _fields(planes: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """Digits [columns, ...] as ggml lays them out: the lowest bits of a run of bytes, then the next ones, and so on."""
    runs = planes.unflatten(0, (-1, run))
    return torch.stack([runs >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)], dim=1).flatten(0, 2)


def _words(columns: Sequence[torch.Tensor], bits: int) -> torch.Tensor:
    """Words of 32 bits, which hold a digit of each of the columns."""
    words = columns[-1].int()
    for column in reversed(columns[:-1]):
        words <<= bits
        words |= column
    return words


def _steps(digits: torch.Tensor, bits: int) -> torch.Tensor:
    """Digits [columns, ...] as the steps that ``formats.h`` describes, side by side."""
    columns = digits.unflatten(0, (-1, 8 if bits == 4 else 16)).unbind(1)  # of all steps
    if bits in (2, 4):
        return _side_by_side(_words(columns, bits))
    each, whole, last = 32 // bits, bits // 2, columns[15].int()
    words = [_words(columns[word * each :][:each], bits) for word in range(whole)]
    for word in range(whole):
        ends = last >> 2 * word & 3
        words[word] = words[word] << 2 | ends if bits == 6 else words[word] | ends << 30
    parts = [_side_by_side(word) for word in words]
    if bits % 2:
        short = _words(columns[whole * each : 15], bits) | last >> (bits - 1) << 15
        parts.append(_side_by_side(short.short()))
    return torch.cat(parts, 3)


def _scales_and_minima(planes: torch.Tensor) -> torch.Tensor:
    """The 12 bytes of Q4_K and Q5_K: eight times a scale and its minimum, of six bits (get_scale_min_k4 in
    ggml-quants.c)."""
    scales, minima, rest = planes.split(4)
    later = (rest & 15) | (scales >> 6 << 4), (rest >> 4) | (minima >> 6 << 4)
    return torch.stack([torch.cat([scales & 63, later[0]]), torch.cat([minima & 63, later[1]])], dim=1).flatten(0, 1)


def _q8_0(planes: torch.Tensor) -> list[torch.Tensor]:
    return [_halves(planes[:2]), _side_by_side(planes[2:])]


def _q4_0(planes: torch.Tensor) -> list[torch.Tensor]:
    return [_halves(planes[:2]), _steps(_fields(planes[2:], 4, 16) ^ 8, 4)]


def _q4_1(planes: torch.Tensor) -> list[torch.Tensor]:
    return [_halves(planes[:4]), _steps(_fields(planes[4:], 4, 16), 4)]


def _q5_0(planes: torch.Tensor) -> list[torch.Tensor]:
    return [_halves(planes[:2]), _steps(_five_bits(planes[2:]) ^ 16, 5)]


def _q5_1(planes: torch.Tensor) -> list[torch.Tensor]:
    return [_halves(planes[:4]), _steps(_five_bits(planes[4:]), 5)]


def _five_bits(planes: torch.Tensor) -> torch.Tensor:
    return _fields(planes[4:], 4, 16) | _fields(planes[:4], 1, 1) << 4


def _iq4_nl(planes: torch.Tensor) -> list[torch.Tensor]:
    return [_halves(planes[:2]), _steps(_fields(planes[2:], 4, 16), 4)]


def _mxfp4(planes: torch.Tensor) -> list[torch.Tensor]:
    return [_side_by_side(planes[:1]), _steps(_fields(planes[1:], 4, 16), 4)]


def _q2_k(planes: torch.Tensor) -> list[torch.Tensor]:
    scales, digits = planes[:16], _fields(planes[16:80], 2, 32)
    return [_halves(planes[80:]), _steps(scales & 15, 4), _steps(scales >> 4, 4), _steps(digits, 2)]


def _q3_k(planes: torch.Tensor) -> list[torch.Tensor]:
    digits = _fields(planes[32:96], 2, 32) | (_fields(planes[:32], 1, 32) ^ 1) << 2
    scales = _fields(planes[96:104], 4, 8) | _fields(planes[104:108], 2, 4) << 4
    return [_halves(planes[108:]), _steps(scales ^ 32, 6), _steps(digits, 3)]


def _q4_k(planes: torch.Tensor) -> list[torch.Tensor]:
    scales, digits = _scales_and_minima(planes[4:16]), _fields(planes[16:], 4, 32)
    return [_halves(planes[:4]), _steps(scales, 6), _steps(digits, 4)]


def _q5_k(planes: torch.Tensor) -> list[torch.Tensor]:
    scales, digits = _scales_and_minima(planes[4:16]), _fields(planes[48:], 4, 32) | _fields(planes[16:48], 1, 32) << 4
    return [_halves(planes[:4]), _steps(scales, 6), _steps(digits, 5)]


def _q6_k(planes: torch.Tensor) -> list[torch.Tensor]:
    digits = _fields(planes[:128], 4, 64) | _fields(planes[128:192], 2, 32) << 4
    return [_halves(planes[208:]), _side_by_side(planes[192:208]), _steps(digits ^ 32, 6)]


def _iq4_xs(planes: torch.Tensor) -> list[torch.Tensor]:
    scales = _fields(planes[4:8], 4, 1)
    return [_halves(planes[:4]), _steps(scales, 4), _steps(_fields(planes[8:], 4, 16), 4)]


def _f8(planes: torch.Tensor) -> list[torch.Tensor]:
    return [_numbers(planes[:4], 4), _float8(planes[4:])]


def _i8(planes: torch.Tensor) -> list[torch.Tensor]:
    return [_numbers(planes[:4], 4), _side_by_side(planes[4:])]  # the zero point, then the digits


def _i4(planes: torch.Tensor) -> list[torch.Tensor]:
    return [_numbers(planes[:4], 4), _side_by_side(planes[4:5]), _steps(_fields(planes[5:], 4, 16), 4)]


def _nvfp4(planes: torch.Tensor) -> list[torch.Tensor]:
    return [_numbers(planes[:4], 4), _float8(planes[4:8]), _steps(_fields(planes[8:], 4, 16), 4)]


def _of_a_table(planes: torch.Tensor) -> list[torch.Tensor]:
    return [_numbers(planes[:4], 4), _steps(_fields(planes[4:], 4, 16), 4)]


def _float8(planes: torch.Tensor) -> torch.Tensor:
    """E4M3, which the C code takes for numbers whatever they are."""
    if ((planes & 127) == 127).any():
        raise ModelRefused(
            "a weight in FP8 (E4M3) has the bytes 0x7f or 0xff, which are not numbers (NaN): nothing can be computed "
            "with it; fetch the checkpoint again, or take another one"
        )
    return _side_by_side(planes)


def _from_grid(
    kind: str, numbers: Sequence[int], apart: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """For a scheme whose blocks say where in a grid several numbers are: digits are places in ``numbers``, then a sign.

    ``apart`` takes blocks apart into scales in half precision, scales of four bits, and blocks whose scales are one.
    """
    bits, places = (3 if len(numbers) <= 4 else 4), torch.arange(len(numbers), dtype=torch.uint8)
    codes = torch.zeros(256, dtype=torch.uint8)  # by the number's lowest byte
    codes[torch.tensor(numbers)] = places
    codes[256 - torch.tensor(numbers)] = places | 1 << (bits - 1)

    def parts(planes: torch.Tensor) -> list[torch.Tensor]:
        halves, scales, plain = apart(planes)
        values = BY_NAME[kind].unpack(plain.flatten(1).T.contiguous()).T * _MULTIPLES[format_of(kind)]
        digits = codes[values.int() & 255].view(256, *planes.shape[1:])
        return [_halves(halves), _steps(scales.repeat_interleave(16 // len(scales), 0), 4), _steps(digits, bits)]

    return parts


def _apart(places: slice, bits: int) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """``places`` are the bytes with scales: of ``bits`` below the highest one or at the top, or two of four bits."""

    def apart(planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found, plain = planes[places], planes.clone()
        plain[0], plain[1] = 0, 0x3C  # one, in half precision
        mask = {3: 0x70, 4: 0xF0, 8: 0xFF}[bits]
        plain[places] = found & (mask ^ 0xFF)
        scales = _fields(found, 4, 1) if bits == 8 else (found & mask) >> 4
        return planes[:2], scales, plain

    return apart


def _iq1_m_apart(planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four words of 16 bits: each four scales of three bits, and above them a part of that in half precision."""
    low, high = planes[48:].unflatten(0, (4, 2)).unbind(1)
    nibbles = high >> 4
    halves = torch.stack([nibbles[0] | nibbles[1] << 4, nibbles[2] | nibbles[3] << 4])
    words = low.int() | high.int() << 8
    scales = torch.stack([words >> shift & 7 for shift in (0, 3, 6, 9)], dim=1).flatten(0, 1)
    plain = planes.clone()
    plain[48:] = torch.tensor([0, 0, 0, 0, 0, 0xC0, 0, 0x30], dtype=torch.uint8).view(8, 1, 1, 1)
    return halves, scales, plain


_MULTIPLES = {Format.IQ1: 8, Format.IQ2: 8, Format.IQ3_XXS: 4, Format.IQ3_S: 1}
"""Of what is computed, to integers."""
_BLOCK_BYTES = {Format.IQ1: 106, Format.IQ2: 106, Format.IQ3_XXS: 138, Format.IQ3_S: 138}
"""Of a channel, where they are not those of the file."""
_PARTS: dict[str, Callable[[torch.Tensor], list[torch.Tensor]]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "IQ4_NL": _iq4_nl,
    "MXFP4": _mxfp4,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
    "F8_128": _f8,
    "F8_32": _f8,
    "I8_128": _i8,
    "I8_32": _i8,
    "I4_128": _i4,
    "I4_32": _i4,
    "NVFP4": _nvfp4,
    "NF4": _of_a_table,
    "FP4": _of_a_table,
    "IQ1_S": _from_grid("IQ1_S", (1, 7, 9), _apart(slice(35, 50, 2), 3)),
    "IQ1_M": _from_grid("IQ1_M", (1, 7, 9), _iq1_m_apart),
    "IQ2_XXS": _from_grid("IQ2_XXS", (8, 25, 43), _apart(slice(9, 66, 8), 4)),
    "IQ2_XS": _from_grid("IQ2_XS", (8, 25, 43), _apart(slice(66, 74), 8)),
    "IQ2_S": _from_grid("IQ2_S", (8, 25, 43), _apart(slice(74, 82), 8)),
    "IQ3_XXS": _from_grid("IQ3_XXS", (4, 12, 20, 28, 36, 44, 52, 62), _apart(slice(69, 98, 4), 4)),
    "IQ3_S": _from_grid("IQ3_S", (1, 3, 5, 7, 9, 11, 13, 15), _apart(slice(106, 110), 8)),
}
"""What the bytes of a block, [bytes, panels, blocks, channels], become: parts [panels, blocks, ...]."""
_OTHER_FORMATS = {
    "BF16": Format.BRAIN,
    "IQ1_S": Format.IQ1,
    "IQ1_M": Format.IQ1,
    "IQ2_XXS": Format.IQ2,
    "IQ2_XS": Format.IQ2,
    "IQ2_S": Format.IQ2,
}
KINDS = (*_PARTS, "BF16")
"""The schemes whose blocks can be packed, by name."""

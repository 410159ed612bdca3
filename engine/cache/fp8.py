"""Keys and values in eight bits: e4m3 numbers, and one power of two for each token and kv head.

The power of two is stored as E8M0 does it, by its exponent plus 127, and is the smallest with which the largest number
of the head does not exceed 448, the largest of e4m3. Multiplying by it is exact: what is read is a number that bfloat16
holds, the same in every backend. The format is that of Rouhani et al., "Microscaling Data Formats for Deep Learning",
2023, with a head where they have 32 numbers.
"""

from __future__ import annotations

import torch

# 448 is 1.75 * 2^8: a number that is at most 1.75 * 2^E fits with the scale 2^(E - 8).
LARGEST_EXPONENT = 8
# Added to the bits of a float32, this carries into the exponent what is above 1.75.
ROUND_UP = 0x7FFFFF - 0x600000
# Below, the smallest e4m3 number, 2^-9, times the scale would not be a normal bfloat16.
LEAST_SCALE = 10


def quantise(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Finite ``numbers`` [..., size] as float8_e4m3fn [..., size], to nearest even, and their scales, uint8 [...]."""
    wide = numbers.float()
    largest = wide.abs().amax(dim=-1).view(torch.int32)
    scales = ((largest + ROUND_UP) >> 23).sub_(LARGEST_EXPONENT).clamp_(min=LEAST_SCALE)
    inverse = ((254 - scales) << 23).view(torch.float32)
    return (wide * inverse.unsqueeze(-1)).to(torch.float8_e4m3fn), scales.to(torch.uint8)


def dequantise(numbers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What ``quantise`` stored, as ``dtype``. Float16 alone cannot hold it where a number was rounded up to 2^16."""
    powers = (scales.int() << 23).view(torch.float32)
    most = torch.finfo(dtype).max
    return (numbers.float() * powers.unsqueeze(-1)).to(dtype).clamp_(-most, most)

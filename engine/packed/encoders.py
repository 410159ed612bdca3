"""From numbers to blocks: Q8_0 and Q4_0 with the bytes of ggml's reference, and FP8 with a scale for each block.

Q8_0 and Q4_0 are ``quantize_row_q8_0_ref`` and ``quantize_row_q4_0_ref`` of ggml-quants.c, in the order of float32
operations that the gguf package has (gguf-py, ``quants.py``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.api.errors import ModelRefused
from engine.packed.schemes import Blocks, Scheme

_TOGETHER = 1 << 18
"""Numbers that are quantised at once: what is made on the way stays in a cache."""
_LARGEST = 8 * torch.finfo(torch.float16).max  # whose eighth is the scale of Q4_0
_LARGEST_F8 = torch.finfo(torch.float8_e4m3fn).max


def in_blocks(numbers: torch.Tensor, scheme: Scheme) -> Blocks:
    """Numbers [..., rows, columns] of any floating type in blocks of a scheme, a few rows at a time.

    Raises ``ModelRefused`` for numbers that are not finite, or too large for a block's scale.
    """
    rows = numbers.reshape(-1, numbers.shape[-1])
    data = torch.empty(len(rows), scheme.row_bytes(rows.shape[1]), dtype=torch.uint8)
    together = max(1, _TOGETHER // rows.shape[1])
    for some, packed in zip(rows.split(together), data.split(together), strict=True):
        blocks = some.float().reshape(-1, scheme.columns)
        largest = blocks.abs().amax(dim=1, keepdim=True)
        if not bool((largest <= _LARGEST).all()):
            raise ModelRefused("a weight holds numbers that are not finite, or far too large, so it is not quantised")
        packed.copy_(ENCODERS[scheme.name](blocks, largest).view(len(some), -1))
    return Blocks(data.view(*numbers.shape[:-1], -1), scheme)


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    inverse = 1 / scales
    return torch.where(inverse.isfinite(), inverse, 0)


def _q8_0(blocks: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    scales = largest / 127
    wanted = blocks * _inverse(scales)
    size = wanted.abs()
    whole = size.floor()
    whole += size.sub_(whole).mul_(2).floor_()  # halves away from zero
    digits = whole.copysign_(wanted)
    return torch.cat([scales.half().view(torch.uint8), digits.to(torch.int8).view(torch.uint8)], dim=1)


def _q4_0(blocks: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    first = (blocks.abs() == largest).int().argmax(dim=1, keepdim=True)
    scales = blocks.gather(1, first) / -8  # the largest number, with its sign, becomes the digit -8
    digits = (blocks * _inverse(scales)).add_(8.5).clamp_(0, 15).to(torch.uint8)  # cut off behind the point
    return torch.cat([scales.half().view(torch.uint8), digits[:, :16] | digits[:, 16:] << 4], dim=1)


def _f8(blocks: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    scales = largest / _LARGEST_F8
    digits = (blocks * _inverse(scales)).clamp_(-_LARGEST_F8, _LARGEST_F8).to(torch.float8_e4m3fn)
    return torch.cat([scales.view(torch.uint8), digits.view(torch.uint8)], dim=1)


ENCODERS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "F8_128": _f8,
    "F8_32": _f8,
}
"""Makes bytes [blocks, bytes of a block] of numbers [blocks, columns] in float32, and the largest size in each."""

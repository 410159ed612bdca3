"""Schemes of quantised safetensors, in blocks of our own: a row's scales lie with its digits, as in GGUF's blocks.

Methods publish digits, scales and zero points as tensors of their own, each in another order. All become a few schemes:
a block is its scale in float32, what else belongs to it, then its digits. Nibbles lie as ggml's do: of each 32 columns,
column j is in the low four bits of byte j and column j + 16 in the high ones.
"""

from __future__ import annotations

import torch

from engine.packed.schemes import TWICE_FP4, Scheme, nibbles

# bitsandbytes' ``create_normal_map``: quantiles of a normal distribution, as its kernels have them (csrc/kernels.cu).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# bitsandbytes' FP4: sign, then eight numbers of their own order (``get_4bit_type("fp4")``), over 12.
_FP4 = tuple(sign * number / 12 for sign in (1, -1) for number in (0, 0.0625, 8, 12, 4, 6, 2, 3))


def _scale(blocks: torch.Tensor, start: int = 0) -> torch.Tensor:
    return blocks[:, start : start + 4].contiguous().view(torch.float32)


def _digits(blocks: torch.Tensor) -> torch.Tensor:
    """Nibbles of several runs of 16 bytes."""
    return nibbles(blocks.reshape(-1, 16)).view(len(blocks), -1)


def _f8(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 4:].contiguous().view(torch.float8_e4m3fn).float() * _scale(blocks)


def _i8(blocks: torch.Tensor) -> torch.Tensor:
    signed = blocks.view(torch.int8).short()
    return (signed[:, 5:] - signed[:, 4:5]).float() * _scale(blocks)


def _i4(blocks: torch.Tensor) -> torch.Tensor:
    zeros = blocks[:, 4:5].contiguous().view(torch.int8)
    return (_digits(blocks[:, 5:]).short() - zeros).float() * _scale(blocks)


def _nvfp4(blocks: torch.Tensor) -> torch.Tensor:
    scales = blocks[:, 4:8].contiguous().view(torch.float8_e4m3fn).float() * _scale(blocks)
    return _table(_HALVED_FP4, blocks[:, 8:]) * scales.repeat_interleave(16, dim=1)


def _nf4(blocks: torch.Tensor) -> torch.Tensor:
    return _table(_NF4, blocks[:, 4:]) * _scale(blocks)


def _fp4(blocks: torch.Tensor) -> torch.Tensor:
    return _table(_FP4, blocks[:, 4:]) * _scale(blocks)


def _bf16(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.contiguous().view(torch.bfloat16).float()


_HALVED_FP4 = tuple(number / 2 for number in TWICE_FP4)


def _table(numbers: tuple[float, ...], packed: torch.Tensor) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=packed.device)[_digits(packed).long()]


F8_128 = Scheme("F8_128", 128, 4 + 128, _f8)
F8_32 = Scheme("F8_32", 32, 4 + 32, _f8)
"""FP8 (E4M3, without infinities: ``float8_e4m3fn``) times a scale."""

I8_128 = Scheme("I8_128", 128, 4 + 1 + 128, _i8)
I8_32 = Scheme("I8_32", 32, 4 + 1 + 32, _i8)
"""A signed digit of eight bits less a signed zero point of eight bits, times a scale."""

I4_128 = Scheme("I4_128", 128, 4 + 1 + 64, _i4)
I4_32 = Scheme("I4_32", 32, 4 + 1 + 16, _i4)
"""A digit from 0 to 15 less a signed zero point of eight bits, times a scale."""

NVFP4 = Scheme("NVFP4", 64, 4 + 4 + 32, _nvfp4)
"""FP4 (E2M1) times a scale in FP8 for each 16 columns, times the matrix's own scale, with which a block begins."""

NF4 = Scheme("NF4", 64, 4 + 32, _nf4)
FP4 = Scheme("FP4", 64, 4 + 32, _fp4)
"""Numbers of bitsandbytes' tables, times the largest of 64."""

BF16 = Scheme("BF16", 1, 2, _bf16)
"""bfloat16 as it is."""

PUBLISHED = (F8_128, F8_32, I8_128, I8_32, I4_128, I4_32, NVFP4, NF4, FP4, BF16)

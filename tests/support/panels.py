"""The C kernels alone, compiled for vectors of any width, and blocks of all schemes to give them."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from engine.native.compiled.compiler import FLAGS, LIBRARIES, find_compiler
from engine.native.compiled.machine_code import TARGETS
from engine.native.library import Matrix
from engine.native.packing import PANEL, Format, Panels
from engine.packed.published_schemes import PUBLISHED
from engine.packed.schemes import BY_NAME, Blocks, Scheme

WIDTHS = (None, 4, 8, 16)
"""Lanes of a vector; None: those of this processor, and the code as it is served. Other code is compiled quickly."""
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "MXFP4": (), "IQ1_M": ()} | dict.fromkeys(
    ("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)
)
"""Where a block has numbers in half precision: for the types that are not here, at its beginning."""
NOTABLE = (0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00, 0xBC01)
"""Zeros, subnormal, largest and usual numbers in half precision."""
NOTABLE_SINGLES = (0.0, -0.0, 2.0**-149, -(2.0**-127), 2.0**-126, 2.0**-100, 2.0**100, -(2.0**110), 1.0, -1 / 3)
"""The same in float32, as far as products with them are finite."""
PUBLISHED_BY_NAME = {scheme.name: scheme for scheme in PUBLISHED}


def gguf_type(kind: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[kind]


def scheme_of(kind: str) -> Scheme:
    return PUBLISHED_BY_NAME.get(kind) or BY_NAME[kind]


def columns_of(kind: str) -> int:
    """How many columns a block has; of numbers that are blocks of their own, as many as a panel takes together."""
    return max(32, scheme_of(kind).columns)


def random_blocks(kind: str, channels: int, columns: int, *, notable: bool) -> torch.Tensor:
    """Blocks of any bytes that stand for finite numbers; ``notable``: of all sizes of scales, else of usual ones."""
    numbers, scheme = np.random.default_rng(sum(kind.encode())), scheme_of(kind)
    blocks = numbers.integers(0, 256, (channels, columns // scheme.columns, scheme.block_bytes), dtype=np.uint8)
    if kind in PUBLISHED_BY_NAME:
        _make_published(kind, blocks, numbers, notable)
        return torch.from_numpy(blocks)
    if kind == "IQ1_M":  # its scale is in the highest bits of four words: these leave out those that are no number
        blocks[:, :, 55] &= 0xBF
    for place in HALVES.get(kind, (0,)):
        halves = numbers.normal(size=blocks.shape[:2]).astype(np.float16).view(np.uint16)
        if notable:
            halves.flat[: 8 * len(NOTABLE)] = numbers.permutation(NOTABLE * 8)
        blocks[:, :, place], blocks[:, :, place + 1] = halves & 255, halves >> 8
    if kind == "MXFP4":  # powers of two; above 250 there are no such floats
        low, high = (0, 251) if notable else (120, 130)
        blocks[:, :, 0] = numbers.integers(low, high, blocks.shape[:2])
        if notable:
            blocks[0, :2, 0] = 0, 1
    return torch.from_numpy(blocks)


def _make_published(kind: str, blocks: np.ndarray, numbers: np.random.Generator, notable: bool) -> None:
    """Scales in float32, and bytes in FP8 or bfloat16 that are numbers."""
    if kind == "BF16":
        weights = torch.from_numpy(numbers.normal(size=blocks.shape[:2])).bfloat16()
        blocks[:] = weights.unsqueeze(2).view(torch.uint8).numpy()
        return
    singles = numbers.normal(size=blocks.shape[:2]).astype(np.float32)
    if notable:
        usable = [number for number in NOTABLE_SINGLES if kind != "NVFP4" or number == 0 or abs(number) >= 2.0**-110]
        singles.flat[: 8 * len(usable)] = numbers.permutation(usable * 8)
    blocks[:, :, :4] = singles[:, :, None].view(np.uint8)
    if kind in ("F8_128", "F8_32", "NVFP4"):
        in_float8 = blocks[:, :, 4 : 8 if kind == "NVFP4" else None]
        in_float8[in_float8 & 127 == 127] = 0


def weights_of(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    """What the blocks stand for, [channels, columns]."""
    if kind in PUBLISHED_BY_NAME:
        return Blocks(blocks.flatten(1), scheme_of(kind)).unpacked()
    return torch.from_numpy(gguf.dequantize(blocks.flatten(1).numpy(), gguf_type(kind)))


class Kernels:
    """``panels.c``, compiled."""

    def __init__(self, folder: Path, width: int | None) -> None:
        flags = [*FLAGS, *TARGETS[0]]
        if width is not None:
            flags = [flag for flag in flags if flag != "-O3"] + [f"-DLANES={width}", "-Og"]
        made = folder / f"panels-{width}.so"
        source = Path(__file__).with_suffix(".c")
        subprocess.run([*find_compiler(), *flags, "-o", str(made), str(source), *LIBRARIES], check=True)
        self._code: Any = ctypes.CDLL(str(made))

    def block_bytes(self, format: Format) -> int:
        """Bytes of a block of 16 channels."""
        return int(self._code.bytes_of_block(int(format)))

    def unpacked(self, panels: Panels, columns: int) -> torch.Tensor:
        """The matrix [channels, columns]."""
        out = torch.empty(len(panels.data), columns, PANEL)
        for panel, floats in zip(panels.data, out, strict=True):
            self._code.unpack_one(
                ctypes.c_void_p(panel.data_ptr()), int(panels.format), columns, ctypes.c_void_p(floats.data_ptr())
            )
        return out.transpose(1, 2).flatten(0, 1)

    def product(self, parts: list[tuple[torch.Tensor, Format]], x: torch.Tensor) -> torch.Tensor:
        """The product [rows, channels] of panels, each with its format, and activations [rows, columns]."""
        addresses = (ctypes.c_void_p * len(parts))(*(panel.data_ptr() for panel, _ in parts))
        formats = (ctypes.c_uint8 * len(parts))(*(int(format) for _, format in parts))
        matrix = Matrix(addresses, formats, None, len(parts), x.shape[1])
        out = torch.full((len(x), PANEL * len(parts)), torch.nan)
        self._code.product(ctypes.byref(matrix), ctypes.c_void_p(x.data_ptr()), len(x), ctypes.c_void_p(out.data_ptr()))
        return out

"""FP8 (E4M3): the methods ``fp8``, ``mxfp8`` and ``fbgemm_fp8`` of transformers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from engine.packed.schemes import Blocks
from engine.quantised.fp4 import mxfp4
from engine.quantised.names import IGNORED, grouped
from engine.quantised.packing import FP8, packed, rows_of, scales_of
from engine.quantised.settings import Settings, damaged

_INV = {
    "(.+)_scale_inv": (r"\1", "scale"),
    r"(.+)\.(?:scale|qscale_weight)": (r"\1.weight", "scale"),  # DeepSeek V4, Mistral Large 4
    r"(.+)\.weight_scale": (r"\1.weight", "scale"),  # AutoFP8
    r"(.+)\.(?:activation_scale|input_scale|qscale_act|k_scale|v_scale|kv_scale)": (r"\1.weight", IGNORED),
    "(.+)_activation_scale": (r"\1", IGNORED),
}
_FBGEMM = {
    "(.+)_scale": (r"\1", "scale"),
    r"(.+)\.input_scale_ub": (r"\1.weight", IGNORED),
}


class Fp8:
    """``weight`` in float8_e4m3fn and ``weight_scale_inv``, which multiplies: of blocks, or of the whole weight.

    DeepSeek, Qwen and others; also stacked experts with ``…_scale_inv``. Scales in bytes are powers of two. Experts in
    FP4 (DeepSeek V4), two in a byte with powers of two, are known by their type.
    """

    def __init__(self, settings: Settings) -> None:
        settings.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
        settings.one_of("scale_fmt", ("float", "ue8m0"), "float")
        settings.one_of("expert_dtype", ("fp8", "fp4"), "fp8")
        size = settings.numbers("weight_block_size", 2)
        self._blocks = [(size[0], size[1])] if size else []
        self.name = f"FP8 in blocks of {size[0]} x {size[1]}" if size else "FP8"

    def grouped(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        # Layers without a weight have a ``scale`` of their own.
        known = [name for name in names if not name.endswith(".scale") or f"{name[:-6]}.weight" in names]
        return grouped(self.name, known, _INV, ("weight", "scale"))

    def read(self, parts: Mapping[str, torch.Tensor]) -> Blocks | torch.Tensor:
        weight, scale = parts["weight"], parts["scale"]
        if weight.dtype in (torch.int8, torch.uint8):
            return mxfp4(self.name, weight, scale)
        return fp8(self.name, weight, scale, self._blocks)


class FbgemmFp8:
    """``weight`` [rows, columns] in float8_e4m3fn and ``weight_scale`` [rows, 1].

    Stacked experts (Llama 4) lie the other way round: [experts, columns, rows] and [experts, 1, rows].
    """

    name = "FP8 of FBGEMM"

    def grouped(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        return grouped(self.name, names, _FBGEMM, ("weight", "scale"))

    def read(self, parts: Mapping[str, torch.Tensor]) -> Blocks | torch.Tensor:
        weight, scale = parts["weight"], parts["scale"]
        if weight.ndim == 3:
            weight, scale = weight.mT.contiguous(), scale.mT
        return fp8(self.name, weight, scale)


def fp8(
    method: str, weight: torch.Tensor, scale: torch.Tensor, blocks: Sequence[tuple[int, int]] = ()
) -> Blocks | torch.Tensor:
    """The weight [..., rows, columns] of its numbers in FP8 and their scales, in any of the shapes of ``grid_of``."""
    if weight.dtype != torch.float8_e4m3fn:
        raise damaged(method, f"a weight that has scales is {weight.dtype}, not float8_e4m3fn")
    flat = rows_of(method, weight)
    return packed(FP8, weight.shape, lambda part: flat[part], scales_of(method, scale, weight.shape, blocks))

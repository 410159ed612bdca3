"""The method ``compressed-tensors`` of llm-compressor: integers, FP8 and FP4, one scheme or several in a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from engine.packed.schemes import Blocks
from engine.quantised.fp4 import mxfp4, nvfp4
from engine.quantised.fp8 import fp8
from engine.quantised.names import IGNORED, grouped
from engine.quantised.packing import INT4, INT8, Digits, Grid, bits_of, grid_of, order_of, packed, rows_of, scales_of
from engine.quantised.settings import Settings, damaged

_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense",
)  # fmt: skip
_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
_STATES = ("compressed", "frozen")  # before 0.9 what is compressed is called frozen
_ENDINGS = {
    r"(.+)\.weight_packed": (r"\1.weight", "packed"),
    r"(.+)\.weight_scale": (r"\1.weight", "scale"),
    r"(.+)\.weight_global_scale": (r"\1.weight", "whole"),
    r"(.+)\.weight_zero_point": (r"\1.weight", "zeros"),
    r"(.+)\.weight_g_idx": (r"\1.weight", "g_idx"),
    r"(.+)\.weight_shape": (r"\1.weight", "shape"),
    r"(.+)\.(?:input|output|[qkv])_(?:scale|zero_point|global_scale)": (r"\1.weight", IGNORED),
}


class CompressedTensors:
    """What a weight is stored as is seen by its parts and their types.

    - ``weight_packed`` in int32: digits of 1 to 8 bits in a stream, half their range added; ``weight_zero_point`` is
      packed so too, along the rows. ``weight_g_idx`` has the group of each column.
    - ``weight_packed`` in bytes: FP4 in pairs, with ``weight_global_scale``, which divides (NVFP4), or without (MXFP4).
    - ``weight`` in int8 or float8_e4m3fn.
    """

    def __init__(self, settings: Settings) -> None:
        whole = settings.one_of("format", _FORMATS, "dense")
        settings.one_of("quantization_status", _STATES, "compressed")
        _refuse_more(settings)
        self._bits: set[int] = set()
        self._blocks: list[tuple[int, int]] = []
        formats = set()
        for name in settings.part("config_groups").found:
            group = settings.part("config_groups").part(name)
            formats.add(group.one_of("format", _FORMATS, whole))
            self._take(group.part("weights"))
        formats -= {"dense", "mixed-precision"}
        self.name = f"compressed-tensors, {' and '.join(sorted(formats)) or whole}"

    def _take(self, weights: Settings) -> None:
        if not weights.found:
            return
        weights.one_of("type", ("int", "float"), "int")
        weights.one_of("strategy", _STRATEGIES, "tensor")
        bits = weights.one_of("num_bits", range(1, 9), 8)
        if weights.found.get("type") != "float":
            self._bits.add(bits)
        if size := weights.numbers("block_structure", 2):
            self._blocks.append((size[0], size[1]))

    def grouped(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        found = grouped(self.name, names, _ENDINGS, ("scale",))
        for weight, parts in found.items():
            if "packed" not in parts and "weight" not in parts:
                raise damaged(self.name, f"{weight} has scales and nothing that they scale")
        return found

    def read(self, parts: Mapping[str, torch.Tensor]) -> Blocks | torch.Tensor:
        if "packed" in parts:
            stored, scale = parts["packed"], parts["scale"]
            if stored.dtype == torch.int32:
                return self._integers(parts)
            if "whole" not in parts:
                return mxfp4(self.name, stored, scale)
            whole = parts["whole"]
            if not whole.is_floating_point():
                raise damaged(self.name, f"weight_global_scale is {whole.dtype}")
            return nvfp4(self.name, stored, scale, 1 / whole.float())
        weight = parts["weight"]
        if weight.dtype != torch.int8:
            if "zeros" in parts and parts["zeros"].float().any():
                raise damaged(self.name, "FP8 with zero points")
            return fp8(self.name, weight, parts["scale"], self._blocks)
        rows = rows_of(self.name, weight)
        return self._with_zeros(parts, list(weight.shape), lambda part: rows[part], 8)

    def _integers(self, parts: Mapping[str, torch.Tensor]) -> Blocks | torch.Tensor:
        words = parts["packed"]
        flat = rows_of(self.name, words)
        shape = parts["shape"].flatten().tolist() if "shape" in parts else []
        if not all(type(one) is int for one in shape) or shape[:-1] != list(words.shape[:-1]):
            raise damaged(self.name, f"weight_shape {shape} does not fit packed numbers {list(words.shape)}")
        bits = next((bits for bits in sorted(self._bits) if -(-shape[-1] * bits // 32) == words.shape[-1]), 0)
        if not bits:
            found = " or ".join(str(one) for one in sorted(self._bits)) or "no"
            raise damaged(self.name, f"packed numbers {list(words.shape)} of {shape} have not {found} bits")

        def digits(part: slice) -> torch.Tensor:
            found = bits_of(flat[part], bits, shape[-1])
            return (found ^ 128).view(torch.int8) if bits == 8 else found

        return self._with_zeros(parts, shape, digits, bits)

    def _with_zeros(
        self, parts: Mapping[str, torch.Tensor], shape: list[int], digits: Digits, bits: int
    ) -> Blocks | torch.Tensor:
        """Digits below 8 bits count from half their range."""
        half = 0 if bits == 8 else 1 << bits - 1
        scale, zeros, order = parts["scale"], parts.get("zeros"), None
        if zeros is not None and zeros.dtype == torch.int32 and "packed" in parts:
            zeros = self._unpacked_zeros(zeros, shape, scale, bits)
        blocks = list(self._blocks)
        if "g_idx" in parts and not (parts["g_idx"] == -1).all():
            if list(parts["g_idx"].shape) != shape[-1:] or not scale.ndim:
                raise damaged(self.name, f"g_idx {list(parts['g_idx'].shape)} does not fit a weight {list(shape)}")
            order = order_of(self.name, parts["g_idx"], scale.shape[-1])
        zero: Grid | int = half
        if zeros is not None:
            zero = grid_of(self.name, zeros, shape, blocks, "zero point")
            zero = replace(zero, values=zero.values.float() + half)
        by_group = digits if order is None else lambda part: digits(part)[:, order]
        kind = INT8 if bits > 4 else INT4
        return packed(kind, shape, by_group, scales_of(self.name, scale, shape, blocks), zero, order)

    def _unpacked_zeros(self, zeros: torch.Tensor, shape: list[int], scale: torch.Tensor, bits: int) -> torch.Tensor:
        """Of words [rows * bits / 32, groups]: signed, [rows, groups]."""
        rows = shape[-2]
        if zeros.shape != (-(-rows * bits // 32), scale.shape[-1] if scale.ndim else 0):
            raise damaged(self.name, f"zero points {list(zeros.shape)} do not fit a weight {list(shape)}")
        return bits_of(zeros.T, bits, rows).T.short() - (1 << bits - 1)


def _refuse_more(settings: Settings) -> None:
    """What would change the numbers: weights left out, and rotations of what goes into a layer."""
    sparsity: Any = settings.part("sparsity_config").found.get("format")
    if sparsity not in (None, "dense"):
        raise settings.refusal("sparsity_config", "weights that are left out are not served")
    groups = settings.part("transform_config").part("config_groups")
    for name in groups.found:
        places = groups.part(name).found.get("apply")
        for one in places if isinstance(places, list) else [places]:
            if not isinstance(one, dict) or not str(one.get("location")).startswith("weight_"):
                raise settings.refusal("transform_config", "inputs that are transformed are not served")

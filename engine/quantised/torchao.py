"""The method ``torchao``, as its tensors are stored in safetensors: one plain tensor for each attribute."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from engine.packed.schemes import Blocks
from engine.quantised.fp8 import fp8
from engine.quantised.names import IGNORED, grouped
from engine.quantised.packing import INT8, Grid, bits_of, grid_of, packed, rows_of, runs, scales_of
from engine.quantised.settings import Settings, damaged, unknown

_KNOWN = (
    "Int4WeightOnlyConfig", "Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig",
    "Float8DynamicActivationFloat8WeightConfig", "IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig",
)  # fmt: skip
_BY_NAME = ("FqnToConfig", "ModuleFqnToConfig")
_ENDINGS = {
    r"(.+)\._([^.]+)_qdata": (r"\1.\2", "qdata"),
    r"(.+)\._([^.]+)_act_quant_(?:scale|zero_point)": (r"\1.\2", IGNORED),
    r"(.+)\._([^.]+)_act_pre_scale": (r"\1.\2", "act_pre_scale"),
    r"(.+)\._([^.]+)_scale_and_zero": (r"\1.\2", "scale_and_zero"),
    r"(.+)\._([^.]+)_zero_point": (r"\1.\2", "zeros"),
    r"(.+)\._([^.]+)_scale": (r"\1.\2", "scale"),
}


class TorchAO:
    """``…_qdata`` and ``…_scale`` of blocks of rows and columns, seen by their shapes, and their types:

    - float8_e4m3fn (Float8Tensor); int8, less ``…_zero_point`` (Int8Tensor, IntxUnpackedToInt8Tensor);
    - two signed digits of four bits in a byte, the first in the low bits, with ``…_scale`` and ``…_zero_point``
      [columns / group, rows]: digit * scale + zero (Int4Tensor). No scheme has a zero that is no integer, so these are
      numbers.
    """

    name = "torchao"

    def __init__(self, settings: Settings) -> None:
        quant_type = settings.found.get("quant_type")
        if not isinstance(quant_type, dict):
            raise settings.refusal("quant_type", "its weights are no data but Python objects")
        self._has_int4 = False
        for one in quant_type.values():
            self._take(settings, one)

    def _take(self, settings: Settings, one: Any) -> None:
        """A configuration of torchao, as its own JSON; None says that a module is not quantised."""
        if one is None:
            return
        kind, data = (one.get("_type"), one.get("_data")) if isinstance(one, dict) else (one, {})
        data = data if isinstance(data, dict) else {}
        if kind in _BY_NAME:
            for below in (data.get("fqn_to_config") or data.get("module_fqn_to_config") or {}).values():
                self._take(settings, below)
            return
        if kind not in _KNOWN:
            raise settings.refusal("quant_type", f"{kind} is not known")
        for key in ("int4_packing_format", "intx_packing_format"):
            layout = data.get(key) or "plain"
            layout = layout.get("_data") if isinstance(layout, dict) else layout
            if str(layout).lower() not in ("plain", "unpacked_to_int8"):
                raise settings.refusal("quant_type", f"the layout {layout} is not known")
        self._has_int4 |= kind == "Int4WeightOnlyConfig"

    def grouped(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        found = grouped(self.name, names, _ENDINGS, ("qdata",))
        for parts in found.values():
            for role in ("act_pre_scale", "scale_and_zero"):
                if role in parts:
                    raise unknown(f"torchao, with {parts[role]}")
            if "scale" not in parts:
                raise damaged(self.name, f"{parts['qdata']} has no scale")
        return found

    def read(self, parts: Mapping[str, torch.Tensor]) -> Blocks | torch.Tensor:
        digits, scale, zeros = parts["qdata"], parts["scale"], parts.get("zeros")
        flat = rows_of(self.name, digits)
        if digits.is_floating_point():
            return fp8(self.name, digits, scale)
        if digits.dtype not in (torch.int8, torch.uint8):
            raise unknown(f"torchao, digits in {digits.dtype}")
        is_turned = scale.ndim > 1 and scale.shape[-1] == digits.shape[-2]
        if self._has_int4 and zeros is not None and zeros.is_floating_point() and is_turned:
            return self._pairs(digits, scale.mT, zeros.mT)
        zero: Grid | int = 0
        if zeros is not None:
            zero = grid_of(self.name, zeros, digits.shape, what="zero point")
        return packed(INT8, digits.shape, lambda part: flat[part], scales_of(self.name, scale, digits.shape), zero)

    def _pairs(self, pairs: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        *stack, half = pairs.shape
        shape = [*stack, 2 * half]
        flat = pairs.reshape(-1, half)
        scales, least = scales_of(self.name, scale, shape), scales_of(self.name, zeros, shape)
        numbers = torch.empty(len(flat), shape[-1])
        for part in runs(len(flat), shape[-1]):
            digits = (bits_of(flat[part], 4, shape[-1]) ^ 8).to(torch.int8) - 8
            numbers[part] = digits * scales.of(part, shape[-1]) + least.of(part, shape[-1])
        return numbers.view(shape)

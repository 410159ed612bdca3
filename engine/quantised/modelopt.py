"""The method of NVIDIA's ModelOpt: FP8 and NVFP4."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from engine.packed.schemes import Blocks
from engine.quantised.fp4 import nvfp4
from engine.quantised.fp8 import fp8
from engine.quantised.names import IGNORED, grouped
from engine.quantised.settings import Settings, damaged, unknown

_KNOWN = ("fp8", "fp8_per_channel_per_token", "fp8_pb_wo", "mxfp8", "nvfp4", "w4a16_nvfp4", "mixed_precision")
_ENDINGS = {
    r"(.+)\.weight_scale_2": (r"\1.weight", "whole"),
    r"(.+)\.weight_scale(?:_inv)?": (r"\1.weight", "scale"),
    r"(.+)\.pre_quant_scale": (r"\1.weight", "pre_quant_scale"),
    r"(.+)\.(?:input_scale|k_scale|v_scale)": (r"\1.weight", IGNORED),
    r"(.*experts\..+)_weight_scale_2": (r"\1", "whole"),
    r"(.*experts\..+)_weight_scale": (r"\1", "scale"),
    r"(.*experts\..+)_input_scale": (r"\1", IGNORED),
}


class ModelOpt:
    """FP8: ``weight`` and ``weight_scale`` of the whole weight, a row, or a block. NVFP4: ``weight`` in bytes of two
    neighbours, ``weight_scale`` in FP8 for each 16 columns, ``weight_scale_2``, which multiplies."""

    def __init__(self, settings: Settings) -> None:
        if "quant_algo" not in settings.found and "quantization" in settings.found:
            settings = settings.part("quantization")
        algorithm = settings.one_of("quant_algo", _KNOWN, "")
        if algorithm == "mixed_precision":
            layers = settings.part("quantized_layers")
            for name in layers.found:
                layers.part(name).one_of("quant_algo", _KNOWN, "")
        if algorithm == "nvfp4" and (settings.found.get("group_size") or 16) != 16:
            raise settings.refusal("group_size", "it must be 16")
        self.name = f"ModelOpt, {algorithm}"

    def grouped(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        found = grouped(self.name, names, _ENDINGS, ("weight", "scale"))
        for weight, parts in found.items():
            if "pre_quant_scale" in parts:
                raise unknown(f"{self.name}, inputs scaled by {parts['pre_quant_scale']}")
            if not weight.endswith(".weight"):
                raise unknown(f"{self.name}, experts in a stack: {weight}")
        return found

    def read(self, parts: Mapping[str, torch.Tensor]) -> Blocks | torch.Tensor:
        weight, scale = parts["weight"], parts["scale"]
        if weight.dtype == torch.uint8:
            if "whole" not in parts:
                raise damaged(self.name, "a weight in NVFP4 has no weight_scale_2")
            return nvfp4(self.name, weight, scale, parts["whole"])
        if scale.ndim == 4:  # of blocks: [rows / 128, 1, columns / 128, 1]
            scale = scale.reshape(scale.shape[0], -1)
        return fp8(self.name, weight, scale, [(128, 128)])

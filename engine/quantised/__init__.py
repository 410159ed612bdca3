"""Methods of quantisation that checkpoints are published with: which stored tensors are one weight, and which blocks
they become."""

from __future__ import annotations

from typing import Any

from engine.quantised.bitsandbytes import BitsAndBytes
from engine.quantised.compressed_tensors import CompressedTensors
from engine.quantised.fp4 import Mxfp4
from engine.quantised.fp8 import FbgemmFp8, Fp8
from engine.quantised.gptq import Awq, Gptq, method_of_autoround
from engine.quantised.method import Method
from engine.quantised.modelopt import ModelOpt
from engine.quantised.settings import Settings, unknown
from engine.quantised.torchao import TorchAO

__all__ = ["Method", "method_of"]

# In the words of a model's files: what else tells of a method that is not known.
_DETAILS = ("fmt", "format", "quant_algo", "weight_format")


def method_of(settings: dict[str, Any]) -> Method:
    """The method of the ``quantization_config`` in config.json.

    Raises ``ModelRefused`` for one that is not served, with its name, the setting and what would work instead.
    """
    method = str(settings.get("quant_method") or _by_bits(settings) or "a method that it does not name")
    found = Settings(method, settings)
    match method:
        case "fp8" | "mxfp8":
            return Fp8(found)
        case "fbgemm_fp8":
            return FbgemmFp8()
        case "mxfp4":
            return Mxfp4()
        case "compressed-tensors" | "compressed_tensors":
            return CompressedTensors(found)
        case "modelopt" | "modelopt_fp4":
            return ModelOpt(found)
        case "awq":
            # AutoAWQ's word is "version", GPTQModel's "format" or "checkpoint_format".
            key = next((one for one in ("version", "format", "checkpoint_format") if settings.get(one)), "version")
            found.one_of(key, ("gemm",), "gemm")
            if settings.get("backend") == "llm-awq":
                raise found.refusal("backend", "known is the layout of AutoAWQ")
            found.one_of("bits" if "bits" in settings else "w_bit", (4,), 4)
            return Awq("AWQ")
        case "gptq":
            key = next((one for one in ("checkpoint_format", "format") if settings.get(one)), "checkpoint_format")
            layout = found.one_of(key, ("gptq", "gptq_v2"), "gptq")
            found.one_of("is_marlin_format", (False,), False)
            found.one_of("bits", range(2, 9), 4)
            return Gptq("GPTQ", is_less_one=layout == "gptq")
        case "auto-round" | "intel/auto-round":
            return method_of_autoround(found)
        case "bitsandbytes":
            return BitsAndBytes(found)
        case "torchao":
            return TorchAO(found)
    details = [str(settings[key]) for key in _DETAILS if isinstance(settings.get(key), str) and settings[key] != method]
    if isinstance(bits := settings.get("bits"), int):
        details.append(f"{bits} bits")
    raise unknown(f"{method} ({', '.join(details)})" if details else method)


def _by_bits(found: dict[str, Any]) -> str:
    """bitsandbytes' settings of earlier versions name no method."""
    return next(("bitsandbytes" for key in ("load_in_4bit", "load_in_8bit") if found.get(key)), "")

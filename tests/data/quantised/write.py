"""Writes the files beside this one: weights that the tools of each method quantised, and the numbers that they make of
them. README.md says what it needs; tests only read the files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
MODULE = "model.layers.0.mlp.down_proj"
Case = tuple[str, dict[str, Any], dict[str, torch.Tensor], torch.Tensor]  # file, settings, tensors, numbers


def weight(rows: int = 8, columns: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def compressed_tensors() -> Iterator[Case]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    cases: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
        "int4_group": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, (8, 128)),
        "int4_channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": True}, (8, 64)),
        "int4_zeros": (
            "pack-quantized",
            {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False},
            (12, 128),
        ),
        "int3_group": (
            "pack-quantized",
            {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False},
            (8, 64),
        ),
        "int8_packed": (
            "pack-quantized",
            {"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False},
            (8, 64),
        ),
        "int8_channel": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, (8, 128)),
        "int8_zeros": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, (8, 96)),
        "fp8_tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, (8, 128)),
        "fp8_channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, (8, 64)),
        "fp8_block": (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 32]},
            (10, 96),
        ),
        "mxfp8": (
            "mxfp8-quantized",
            {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
            (8, 64),
        ),
        "mxfp4": (
            "mxfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
            (8, 64),
        ),
        "nvfp4": (
            "nvfp4-pack-quantized",
            {
                "num_bits": 4,
                "type": "float",
                "strategy": "tensor_group",
                "group_size": 16,
                "scale_dtype": "torch.float8_e4m3fn",
            },
            (8, 128),
        ),
    }
    for name, (layout, settings, (rows, columns)) in cases.items():
        args = QuantizationArgs(**settings)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
        source = weight(rows, columns)
        state = {"weight": source}
        if settings["strategy"] == "block":
            high, wide = settings["block_structure"]
            padded = torch.nn.functional.pad(source, (0, -columns % wide, 0, -rows % high))
            runs = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).transpose(1, 2).flatten(2)
        elif size := settings.get("group_size"):
            runs = source.unflatten(1, (-1, size))
        else:
            runs = source.unsqueeze(1) if settings["strategy"] == "channel" else source.view(1, 1, -1)
        whole = None
        if settings["strategy"] == "tensor_group":
            whole = state["weight_global_scale"] = generate_gparam(source.min(), source.max())
        scale, zero = calculate_qparams(runs.amin(-1), runs.amax(-1), args, global_scale=whole)
        state["weight_scale"], state["weight_zero_point"] = scale, zero
        compressor = BaseCompressor.get_value_from_registry(layout)
        stored = compressor.compress(state, scheme)
        numbers = compressor.decompress(stored, scheme)["weight"]
        if layout.startswith("nvfp4"):  # which it rounds to bfloat16
            digits = unpack_fp4_from_uint8(stored["weight_packed"], rows, columns, dtype=torch.float32)
            numbers = dequantize(digits, stored["weight_scale"].float(), args=args, global_scale=whole)
        group = json.loads(scheme.model_dump_json())
        yield (
            f"compressed_tensors_{name}",
            {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}},
            {f"{MODULE}.{key}": value for key, value in stored.items()},
            numbers,
        )


def bitsandbytes() -> Iterator[Case]:
    from bitsandbytes import functional

    for kind, size, nested, columns in (("nf4", 64, True, 128), ("nf4", 128, False, 192), ("fp4", 64, False, 96)):
        packed, state = functional.quantize_4bit(
            weight(8, columns), blocksize=size, quant_type=kind, compress_statistics=nested
        )
        numbers = functional.dequantize_4bit(packed, state)
        tensors = {f"{MODULE}.weight": packed}
        tensors |= {f"{MODULE}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        yield f"bitsandbytes_{kind}_{size}", settings, tensors, numbers
    digits, scale, _ = functional.int8_vectorwise_quant(weight().half())
    tensors = {f"{MODULE}.weight": digits, f"{MODULE}.SCB": scale, f"{MODULE}.weight_format": torch.tensor(0).byte()}
    numbers = functional.int8_vectorwise_dequant(digits, scale)
    yield "bitsandbytes_int8", {"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors, numbers


def torchao() -> Iterator[Case]:
    from torchao.core.config import config_to_dict
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerGroup,
        quantize_,
    )

    cases = {
        "int8": Int8WeightOnlyConfig(version=2),
        "fp8": Float8WeightOnlyConfig(),
        "int4_group": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        "int8_zeros": IntxWeightOnlyConfig(
            weight_dtype=torch.int8, granularity=PerAxis(0), mapping_type=MappingType.ASYMMETRIC
        ),
    }
    for name, config in cases.items():
        linear = torch.nn.Linear(128, 8, bias=False)
        linear.weight.data = weight()
        quantize_(linear, config)
        tensors, _ = flatten_tensor_state_dict({f"{MODULE}.weight": linear.weight.data})
        settings = {"quant_method": "torchao", "quant_type": {"default": config_to_dict(config)}}
        yield f"torchao_{name}", settings, tensors, linear.weight.data.dequantize()


def auto_round() -> Iterator[Case]:
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    for layout, source, bits, size in (
        ("auto_gptq", qlinear_torch_zp, 4, 32),
        ("auto_gptq", qlinear_torch_zp, 8, 64),
        ("auto_gptq", qlinear_torch_zp, 3, 32),
        ("gptqmodel", qlinear_torch, 4, 64),
        ("gptqmodel", qlinear_torch, 2, 32),
        ("auto_awq", None, 4, 32),
    ):
        linear = torch.nn.Linear(64, 32, bias=False)
        linear.weight.data = weight(32, 64)
        runs = linear.weight.data.unflatten(1, (-1, size))
        scale = ((runs.amax(-1) - runs.amin(-1)) / (2**bits - 1)).half().float()
        zero = (-runs.amin(-1) / scale).round().clamp(1, 2**bits - 1)
        if source is None:
            module = WQLinear_GEMM.from_linear(linear, bits, size, scales=scale.T, zeros=zero.T.int(), device="cpu")
            numbers = dequantize_gemm(module.qweight, module.qzeros, module.scales.float(), bits, size).T
        else:
            module = source.QuantLinear(bits, size, 64, 32, False, g_idx=True)
            module.device = "cpu"
            module.pack(linear, scale, zero, None, device="cpu")
            module.scales = module.scales.float()
            module.dequant_dtype = torch.int32
            numbers = module(torch.eye(64)).T
        tensors = {f"{MODULE}.{key}": getattr(module, key) for key in ("qweight", "qzeros", "scales")}
        if hasattr(module, "g_idx"):
            tensors[f"{MODULE}.g_idx"] = module.g_idx
        settings = {"quant_method": "auto-round", "packing_format": f"auto_round:{layout}", "bits": bits}
        yield f"auto_round_{layout}_{bits}", {**settings, "group_size": size}, tensors, numbers


def gptqmodel() -> Iterator[Case]:
    """With inputs out of order, as ``desc_act`` has them."""
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    group_of = torch.arange(64)[torch.randperm(64, generator=torch.Generator().manual_seed(1))] // 32
    for layout, bits in (("gptq_v2", 4), ("gptq", 4)):
        linear = torch.nn.Linear(64, 32, bias=False)
        linear.weight.data = weight(32, 64)
        runs = torch.stack([linear.weight.data[:, group_of == group] for group in range(2)], dim=1)
        scale = ((runs.amax(-1) - runs.amin(-1)) / (2**bits - 1)).half().float()
        zero = (-runs.amin(-1) / scale).round().clamp(1, 2**bits - 1)
        module = TorchLinear(bits, 32, False, True, 64, 32)
        module.pack_original(linear, scale, zero, group_of.int())
        module.scales = module.scales.float()
        numbers = module.dequantize_weight().T
        if layout == "gptq":
            convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits, group_size=32))
        tensors = {f"{MODULE}.{key}": getattr(module, key) for key in ("qweight", "qzeros", "scales", "g_idx")}
        settings = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": True}
        yield f"gptqmodel_{layout}", {**settings, "checkpoint_format": layout}, tensors, numbers


def main() -> None:
    for tool in (compressed_tensors, bitsandbytes, torchao, auto_round, gptqmodel):
        if sys.argv[1:] and tool.__name__ not in sys.argv[1:]:
            continue
        for name, settings, tensors, numbers in tool():
            assert numbers.dtype in (torch.float32, torch.bfloat16, torch.float16), numbers.dtype
            held = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
            held["numbers"] = numbers.detach().contiguous().clone()
            described = {"weight": f"{MODULE}.weight", "quantization_config": json.dumps(settings)}
            save_file(held, HERE / f"{name}.safetensors", described)
            print(name, {key: (str(one.dtype), *one.shape) for key, one in held.items()})


if __name__ == "__main__":
    main()

"""Methods and settings that are refused before a weight is fetched, and stored tensors that are not what was said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.api.errors import ModelRefused
from engine.quantised import method_of

INSTEAD = "; take the repository of the same model in bfloat16, or a GGUF file of it"
UNKNOWN = (
    "aqlm", "bitnet", "eetq", "fouroversix", "fp_quant", "gemma", "gguf", "higgs", "hqq", "metal", "nvfp4", "quanto",
    "quark", "sinq", "spqr", "vptq", "exl3", "deepspeedfp",
)  # fmt: skip


@pytest.mark.parametrize("method", UNKNOWN)
def test_every_other_method_is_refused_by_name(method: str) -> None:
    with pytest.raises(ModelRefused) as refused:
        method_of({"quant_method": method, "bits": 2, "weight_format": "w"})
    assert (
        str(refused.value) == f"quantised weights (quantization_config: {method} (w, 2 bits)) are not loaded{INSTEAD}"
    )


def test_settings_that_name_no_method() -> None:
    with pytest.raises(ModelRefused, match="a method that it does not name"):
        method_of({"bits": "4"})
    assert method_of({"load_in_8bit": True}).name == "bitsandbytes, 8 bits"


def with_group(layout: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    group = {"weights": {"num_bits": 4, "strategy": "group", **weights}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"g": group}}


def of_torchao(kind: str, **data: Any) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_data": data}}}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8, fmt 'e5m2'"),
        ({"quant_method": "fp8", "scale_fmt": "log"}, "scale_fmt 'log'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\].*2 positive integers"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "2 positive integers"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "2 positive integers"),
        ({"quant_method": "awq", "version": "gemv"}, "awq, version 'gemv'.*gemm"),
        ({"quant_method": "awq", "version": "marlin"}, "version 'marlin'"),
        ({"quant_method": "awq", "checkpoint_format": "gemv_fast"}, "checkpoint_format 'gemv_fast'"),
        ({"quant_method": "awq", "backend": "llm-awq"}, "backend 'llm-awq'"),
        ({"quant_method": "awq", "bits": 3}, "bits 3"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "gptq, checkpoint_format 'marlin'"),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_p"}, "gptq_p"),
        ({"quant_method": "gptq", "bits": 1}, "bits 1"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "is_marlin_format True"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:marlin"}, "auto_round:marlin"),
        ({"quant_method": "auto-round", "data_type": "mx_fp"}, "auto-round, data_type 'mx_fp'"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 8}, "bits 8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "af4"}, "af4"),
        ({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": []}, r"bnb_4bit_quant_type \[\]"),
        (with_group("marlin-24"), "compressed-tensors, format 'marlin-24'"),
        (with_group("mxfp6-pack-quantized"), "mxfp6-pack-quantized"),
        (with_group(strategy="attn_head"), "strategy 'attn_head'"),
        (with_group(num_bits=16), "num_bits 16"),
        (with_group(type="complex"), "type 'complex'"),
        ({**with_group(), "quantization_status": "calibration"}, "quantization_status 'calibration'.*compressed"),
        ({**with_group(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({**with_group(), "config_groups": []}, r"config_groups \[\]: it must be|config_groups \[\].*object"),
        (
            {**with_group(), "transform_config": {"config_groups": {"R3": {"apply": [{"location": "input"}]}}}},
            "transform_config",
        ),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "modelopt, quant_algo 'W4A8_AWQ'"),
        ({"quant_method": "modelopt"}, "quant_algo None"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "group_size 32"),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"l": {"quant_algo": "INT4_AWQ"}},
            },
            "INT4_AWQ",
        ),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao, quant_type 'int4_weight_only'"),
        (of_torchao("UIntXWeightOnlyConfig"), "UIntXWeightOnlyConfig is not known"),
        (of_torchao("Int4WeightOnlyConfig", int4_packing_format={"_data": "TILE_PACKED_TO_4D"}), "TILE_PACKED_TO_4D"),
        (of_torchao("FqnToConfig", fqn_to_config={"lm_head": {"_type": "NVFP4Config"}}), "NVFP4Config is not known"),
    ],
)
def test_a_setting_is_refused_with_method_value_and_next_step(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelRefused, match=said) as refused:
        method_of(settings)
    assert str(refused.value).startswith(f"quantised weights ({settings['quant_method']}, ")
    assert str(refused.value).endswith(INSTEAD)


@pytest.mark.parametrize(
    "settings",
    [
        {**with_group(), "quantization_status": "frozen", "sparsity_config": {}, "transform_config": {}},
        {**with_group(), "transform_config": {"config_groups": {"R1": {"apply": [{"location": "weight_output"}]}}}},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": None, "input_activations": {}}}},
        of_torchao("FqnToConfig", fqn_to_config={"re:.*q": {"_type": "Int8WeightOnlyConfig"}, "_default": None}),
        {"quant_method": "awq", "w_bit": 4, "version": "GEMM", "zero_point": True},
        {"quant_method": "intel/auto-round", "packing_format": "auto_round:gptqmodel", "bits": 2},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"l": {"quant_algo": "FP8"}}},
    ],
)
def test_what_models_are_published_with_is_taken(settings: dict[str, Any]) -> None:
    assert method_of(settings).name


F8 = torch.zeros(8, 128, dtype=torch.float8_e4m3fn)
WORDS, SCALES = torch.zeros(16, 32, dtype=torch.int32), torch.ones(4, 32)  # 128 inputs, 32 outputs, groups of 32
BYTES = torch.zeros(8, 64, dtype=torch.uint8)
STATE = b'{"quant_type": "nf4", "blocksize": 64, "shape": [8, 128], "dtype": "float32"}'


def state(text: bytes = STATE) -> torch.Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def gptq(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    zeros = torch.zeros(4, 4, dtype=torch.int32)
    return {"qweight": WORDS, "qzeros": zeros, "scales": SCALES, "g_idx": torch.arange(128) // 32, **changed}


def four_bits(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": torch.zeros(512, 1, dtype=torch.uint8), "absmax": torch.ones(16), "state": state(), **changed}


def integers(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    words = torch.zeros(8, 16, dtype=torch.int32)
    return {"packed": words, "scale": torch.ones(8, 4), "shape": torch.tensor([8, 128]), **changed}


FP8_128 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
INT8 = of_torchao("Int8WeightOnlyConfig")
DAMAGED: list[tuple[dict[str, Any], dict[str, torch.Tensor], str]] = [
    (FP8_128, {"weight": F8, "scale": torch.ones(3, 5)}, r"\[3, 5\] does not fit a weight \[8, 128\]"),
    (FP8_128, {"weight": F8, "scale": torch.ones(0, 0)}, "does not fit"),
    (FP8_128, {"weight": F8.float(), "scale": torch.ones(1, 1)}, "float32, not float8_e4m3fn"),
    (FP8_128, {"weight": F8.to(torch.float8_e5m2), "scale": torch.ones(1, 1)}, "float8_e5m2, not"),
    (FP8_128, {"weight": F8[0], "scale": torch.ones(1)}, r"a weight is \[128\]"),
    (FP8_128, {"weight": F8, "scale": torch.tensor([[float("nan")]])}, "no finite number"),
    (FP8_128, {"weight": F8, "scale": torch.tensor([[float("inf")]])}, "no finite number"),
    (FP8_128, {"weight": F8, "scale": torch.ones(1, 1, dtype=torch.int32)}, "scales are torch.int32"),
    (FP8_128, {"weight": BYTES, "scale": torch.ones(8, 4)}, "scales are torch.float32, not bytes"),
    ({"quant_method": "mxfp4"}, {"blocks": BYTES, "scales": BYTES}, "not .*groups, 16"),
    ({"quant_method": "mxfp4"}, {"blocks": BYTES.view(8, 4, 16), "scales": BYTES}, "do not fit"),
    ({"quant_method": "mxfp4"}, {"blocks": BYTES.view(8, 4, 16).float(), "scales": BYTES[:, :4]}, "not bytes"),
    (NVFP4, {"weight": BYTES, "scale": F8[:, :8]}, "no weight_scale_2"),
    (NVFP4, {"weight": BYTES, "scale": F8[:, :7], "whole": torch.ones(())}, "do not fit"),
    (NVFP4, {"weight": BYTES, "scale": F8[:, :8].float(), "whole": torch.ones(())}, "not float8_e4m3fn"),
    (NVFP4, {"weight": BYTES, "scale": F8[:, :8], "whole": torch.ones(8)}, "the scale of a matrix"),
    ({"quant_method": "gptq"}, gptq(qzeros=torch.zeros(4, 3, dtype=torch.int32)), "do not fit together"),
    ({"quant_method": "gptq"}, gptq(qzeros=torch.zeros(3, 4, dtype=torch.int32)), "do not fit together"),
    ({"quant_method": "gptq"}, gptq(qweight=WORDS[:, :31]), "do not fit together"),
    ({"quant_method": "gptq"}, gptq(qweight=WORDS.short()), "not int32"),
    ({"quant_method": "gptq"}, gptq(scales=SCALES[:, :0]), "do not fit together"),
    ({"quant_method": "gptq"}, gptq(g_idx=torch.arange(127) // 32), "g_idx .* does not fit 128"),
    ({"quant_method": "gptq"}, gptq(g_idx=torch.arange(128) // 16), "beyond the 4"),
    ({"quant_method": "gptq"}, gptq(g_idx=torch.arange(128) // 32 - 1), "beyond the 4"),
    ({"quant_method": "gptq"}, gptq(g_idx=torch.zeros(128).long()), "differ in size"),
    ({"quant_method": "awq"}, gptq(), "do not fit together"),
    (with_group(), integers(shape=torch.tensor([9, 128])), r"weight_shape \[9, 128\] does not fit"),
    (with_group(), integers(shape=torch.tensor([8, 96])), r"have not 4 bits"),
    (with_group(), integers(scale=torch.ones(8, 3)), "does not fit a weight"),
    (with_group(), integers(g_idx=torch.arange(96) // 32), r"g_idx \[96\]"),
    (with_group(), integers(zeros=torch.zeros(2, 4, dtype=torch.int32)), r"zero points \[2, 4\]"),
    (with_group(), {"weight": torch.zeros(8, 128), "scale": torch.ones(8, 4)}, "float32, not float8_e4m3fn"),
    (with_group(), {"weight": F8, "scale": torch.ones(8, 1), "zeros": torch.ones(8, 1)}, "zero points"),
    ({"load_in_4bit": True}, four_bits(absmax=torch.ones(15)), "15 scales do not fit"),
    ({"load_in_4bit": True}, four_bits(weight=BYTES[:4]), "256 bytes and 16 scales do not fit"),
    ({"load_in_4bit": True}, four_bits(absmax=torch.zeros(16, dtype=torch.uint8)), "what they stand for is missing"),
    ({"load_in_4bit": True}, four_bits(absmax=torch.full((16,), float("inf"))), "no finite number"),
    ({"load_in_4bit": True}, four_bits(state=state(b"{")), "quant_state cannot be read"),
    ({"load_in_4bit": True}, four_bits(state=state(b"[" * 60000)), "quant_state cannot be read"),
    ({"load_in_4bit": True}, four_bits(state=state(b"[]")), "quant_state cannot be read"),
    ({"load_in_4bit": True}, four_bits(state=state(STATE.replace(b"nf4", b"nf5"))), "nf5"),
    ({"load_in_4bit": True}, four_bits(state=state(STATE.replace(b"64", b"-1"))), "quant_state cannot be read"),
    ({"load_in_8bit": True}, {"weight": F8.view(torch.int8), "scale": torch.ones(7)}, r"SCB \[7\] does not fit"),
    (
        {"load_in_8bit": True},
        {"weight": F8.view(torch.int8), "scale": torch.ones(8), "layout": torch.tensor(2)},
        "weight_format 2",
    ),
    (INT8, {"qdata": F8.view(torch.int8), "scale": torch.ones(8, 3)}, "does not fit a weight"),
    (INT8, {"qdata": WORDS, "scale": torch.ones(8, 1)}, "torchao, digits in torch.int32"),
    (INT8, {"qdata": F8[0].view(torch.int8), "scale": torch.ones(1)}, "a weight is"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "parts", "said"), DAMAGED)
def test_parts_that_do_not_fit_are_refused(settings: dict[str, Any], parts: dict[str, torch.Tensor], said: str) -> None:
    method = method_of(settings)
    with pytest.raises(ModelRefused, match=said):
        method.read(parts)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (FP8_128, {"weight": F8, "scale": torch.ones(1, 1)}),
        ({"quant_method": "gptq"}, gptq()),
        (with_group(), integers()),
        ({"load_in_4bit": True}, four_bits()),
    ],
)
def test_what_the_damaged_ones_were_is_read(settings: dict[str, Any], parts: dict[str, torch.Tensor]) -> None:
    found = method_of(settings).read(parts)
    assert found.shape in ((8, 128), (32, 128))

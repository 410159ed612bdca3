"""Which stored tensors are one weight, in each method's names."""

from __future__ import annotations

from typing import Any

import pytest

from engine.api.errors import ModelRefused
from engine.quantised import method_of

LAYER = "model.layers.0"
DOWN = f"{LAYER}.mlp.down_proj"
K = f"{LAYER}.self_attn.k_proj"
PLAIN = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", f"{DOWN}.bias"]
INT8 = {"default": {"_type": "Int8WeightOnlyConfig"}}


def parts(module: str, **roles: str) -> dict[str, str]:
    return {role: f"{module}{ending}" for role, ending in roles.items()}


CASES: dict[str, tuple[dict[str, Any], dict[str, dict[str, str]]]] = {
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {
            f"{DOWN}.weight": parts(DOWN, weight=".weight", scale=".weight_scale_inv", ignored=".activation_scale"),
            f"{LAYER}.mlp.experts.gate_up_proj": parts(
                f"{LAYER}.mlp.experts.gate_up_proj", weight="", scale="_scale_inv", ignored="_activation_scale"
            ),
        },
    ),
    "fp8 of DeepSeek V4": (
        {"quant_method": "fp8"},
        {f"{LAYER}.ffn.experts.0.w1.weight": parts(f"{LAYER}.ffn.experts.0.w1", weight=".weight", scale=".scale")},
    ),
    "fp8 of AutoFP8": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        {f"{K}.weight": parts(K, weight=".weight", scale=".weight_scale", ignored=".input_scale")},
    ),
    "fbgemm_fp8": (
        {"quant_method": "fbgemm_fp8"},
        {f"{DOWN}.weight": parts(DOWN, weight=".weight", scale=".weight_scale", ignored=".input_scale_ub")},
    ),
    "mxfp4": (
        {"quant_method": "mxfp4"},
        {f"{LAYER}.mlp.experts.down_proj": parts(f"{LAYER}.mlp.experts.down_proj", blocks="_blocks", scales="_scales")},
    ),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {
            f"{DOWN}.weight": parts(
                DOWN,
                packed=".weight_packed",
                scale=".weight_scale",
                zeros=".weight_zero_point",
                g_idx=".weight_g_idx",
                shape=".weight_shape",
                ignored=".input_scale",
            ),
            f"{K}.weight": parts(K, weight=".weight", scale=".weight_scale"),
        },
    ),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {
            f"{K}.weight": {
                **parts(K, weight=".weight", scale=".weight_scale", whole=".weight_scale_2", ignored=".input_scale"),
                "ignored 2": f"{K}.k_scale",
            }
        },
    ),
    "awq": (
        {"quant_method": "awq"},
        {f"{DOWN}.weight": parts(DOWN, qweight=".qweight", qzeros=".qzeros", scales=".scales")},
    ),
    "gptq": (
        {"quant_method": "gptq"},
        {f"{DOWN}.weight": parts(DOWN, qweight=".qweight", qzeros=".qzeros", scales=".scales", g_idx=".g_idx")},
    ),
    "bitsandbytes": (
        {"load_in_4bit": True},
        {
            f"{DOWN}.weight": parts(
                f"{DOWN}.weight",
                weight="",
                absmax=".absmax",
                quant_map=".quant_map",
                nested_absmax=".nested_absmax",
                nested_quant_map=".nested_quant_map",
                state=".quant_state.bitsandbytes__nf4",
            ),
            f"{K}.weight": parts(K, weight=".weight", scale=".SCB", layout=".weight_format"),
        },
    ),
    "torchao": (
        {"quant_method": "torchao", "quant_type": INT8},
        {
            f"{DOWN}.weight": parts(DOWN, qdata="._weight_qdata", scale="._weight_scale", zeros="._weight_zero_point"),
            f"{LAYER}.mlp.experts.down_proj": parts(
                f"{LAYER}.mlp.experts", qdata="._down_proj_qdata", scale="._down_proj_scale"
            ),
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_parts_of_a_weight(name: str) -> None:
    """Beside them lies what is not quantised: lists of exceptions name it, and it has no parts but itself."""
    settings, expected = CASES[name]
    stored = [one for weight in expected.values() for one in weight.values()]
    ignore = {"ignore": ["lm_head", "re:.*embed.*"], "modules_to_not_convert": ["lm_head"]}
    method = method_of({**settings, **ignore})
    assert method.grouped([*PLAIN, *stored]) == expected
    assert method.grouped({*PLAIN, *stored}).keys() == expected.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_without_quantised_weights_has_none(name: str) -> None:
    assert method_of(CASES[name][0]).grouped([*PLAIN, "vision.norm.scale"]) == {}


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("fp8", f"{DOWN}.weight"),
        ("fbgemm_fp8", f"{DOWN}.weight"),
        ("mxfp4", f"{LAYER}.mlp.experts.down_proj_scales"),
        ("compressed-tensors", f"{DOWN}.weight_packed"),
        ("compressed-tensors", f"{DOWN}.weight_scale"),
        ("modelopt", f"{K}.weight"),
        ("awq", f"{DOWN}.qzeros"),
        ("gptq", f"{DOWN}.scales"),
        ("bitsandbytes", f"{DOWN}.weight.absmax"),
        ("bitsandbytes", f"{DOWN}.weight.quant_state.bitsandbytes__nf4"),
        ("torchao", f"{DOWN}._weight_scale"),
        ("torchao", f"{DOWN}._weight_qdata"),
    ],
)
def test_a_part_that_is_missing_is_named_by_its_weight(name: str, lost: str) -> None:
    settings, expected = CASES[name]
    stored = [one for weight in expected.values() for one in weight.values() if one != lost]
    with pytest.raises(ModelRefused, match=r"down_proj|k_proj"):
        method_of(settings).grouped([*PLAIN, *stored])


def test_scales_of_a_cache_belong_to_no_weight() -> None:
    settings, expected = CASES["compressed-tensors"]
    stored = [one for weight in expected.values() for one in weight.values()]
    cache = [f"{LAYER}.self_attn.{one}_scale" for one in "kv"]
    found = method_of(settings).grouped([*stored, *cache])
    assert found.keys() == expected.keys()
    ignored = {one for weight in found.values() for role, one in weight.items() if role.startswith("ignored")}
    assert ignored == {f"{DOWN}.input_scale", *cache}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            (f"{K}.pre_quant_scale", f"{K}.weight_scale", f"{K}.weight"),
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            ("experts.gate_up_proj", "experts.gate_up_proj_weight_scale", "experts.gate_up_proj_weight_scale_2"),
        ),
        ({"quant_method": "torchao", "quant_type": INT8}, (f"{K}._weight_act_pre_scale", f"{K}._weight_qdata")),
        ({"quant_method": "torchao", "quant_type": INT8}, (f"{K}._weight_scale_and_zero", f"{K}._weight_qdata")),
    ],
)
def test_parts_that_are_not_served_are_named(settings: dict[str, Any], names: tuple[str, ...]) -> None:
    with pytest.raises(ModelRefused, match=rf"{names[0]}.*; take the repository of the same model in bfloat16"):
        method_of(settings).grouped(names)

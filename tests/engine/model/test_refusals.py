"""What is said of models that cannot be served."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine.api.errors import ModelRefused
from engine.model.probe import DryRunFailed
from engine.model.refusals import advised, quantised

PLANE = SimpleNamespace(model_type="plane", architectures=["PlaneForCausalLM"])


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}, "fp8 (e4m3)"),
        ({"quant_method": "awq", "bits": 4}, "awq (4 bits)"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": True}, "gptq (4 bits)"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors (pack-quantized)"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt (NVFP4)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({}, "a method that it does not name"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_quantised_weights_are_named_by_their_method(settings: dict[str, Any], shown: str) -> None:
    config = SimpleNamespace(model_type="plane", quantization_config=settings)
    assert quantised(config) == (
        f"plane has quantised weights (quantization_config: {shown}), which are not loaded; take the repository of the "
        "same model in bfloat16, or a GGUF file of it"
    )


def test_settings_may_be_an_object() -> None:
    found = SimpleNamespace(to_dict=lambda: {"quant_method": "mxfp4"})
    said = quantised(SimpleNamespace(model_type="gpt_oss", quantization_config=found))
    assert said.startswith("gpt_oss has quantised weights (quantization_config: mxfp4)")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "its mask is round",
            "PlaneForCausalLM: its mask is round; decoders with full or sliding attention, gated ",
        ),
        (
            "layer 0 of plane is round",
            "layer 0 of plane is round; decoders with full or sliding attention, gated ",
        ),
        ("plane is round; only flat ones are served", "plane is round; only flat ones are served"),
    ],
)
def test_class_and_advice_are_added_where_they_are_missing(said: str, told: str) -> None:
    with pytest.raises(ModelRefused) as refusal, advised(PLANE):
        raise ModelRefused(said)
    assert str(refusal.value).startswith(told)


def test_an_error_of_the_models_own_code_is_left_as_it_is() -> None:
    with pytest.raises(DryRunFailed, match=r"^shapes differ$"), advised(PLANE):
        raise DryRunFailed("shapes differ")

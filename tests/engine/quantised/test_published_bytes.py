"""Weights that another's tool quantised and stored: their numbers are the tool's own. tests/data/quantised has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from engine.packed.schemes import Blocks
from engine.quantised import method_of

FILES = sorted((Path(__file__).parents[2] / "data" / "quantised").glob("*.safetensors"))
SCHEMES = {
    "auto_round_auto_awq_4": "I4_32",
    "auto_round_auto_gptq_3": "I4_32",
    "auto_round_auto_gptq_4": "I4_32",
    "auto_round_auto_gptq_8": "I8_32",
    "auto_round_gptqmodel_2": "I4_32",
    "auto_round_gptqmodel_4": "I4_32",
    "bitsandbytes_fp4_64": None,  # 96 columns: blocks go on over the ends of rows
    "bitsandbytes_int8": "I8_128",
    "bitsandbytes_nf4_128": "NF4",
    "bitsandbytes_nf4_64": "NF4",
    "compressed_tensors_fp8_block": "F8_32",
    "compressed_tensors_fp8_channel": "F8_32",
    "compressed_tensors_fp8_tensor": "F8_128",
    "compressed_tensors_int3_group": "I4_32",
    "compressed_tensors_int4_channel": "I4_32",
    "compressed_tensors_int4_group": "I4_32",
    "compressed_tensors_int4_zeros": "I4_32",
    "compressed_tensors_int8_channel": "I8_128",
    "compressed_tensors_int8_packed": "I8_32",
    "compressed_tensors_int8_zeros": "I8_32",
    "compressed_tensors_mxfp4": "MXFP4",
    "compressed_tensors_mxfp8": "F8_32",
    "compressed_tensors_nvfp4": "NVFP4",
    "gptqmodel_gptq": "I4_32",
    "gptqmodel_gptq_v2": "I4_32",
    "torchao_fp8": "F8_128",
    "torchao_int4_group": "I8_32",
    "torchao_int8": "I8_128",
    "torchao_int8_zeros": "I8_128",
}
# Where a tool multiplies or divides in another order than a block does: one rounding of float32 more.
ROUNDED = {"bitsandbytes_int8", "compressed_tensors_nvfp4"}


def test_every_file_has_its_scheme() -> None:
    assert [path.stem for path in FILES] == sorted(SCHEMES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_numbers_are_those_of_the_tool(path: Path) -> None:
    with safe_open(path, "pt") as stored:
        described = stored.metadata()
        names = set(stored.keys()) - {"numbers"}
        method = method_of(json.loads(described["quantization_config"]))
        found = method.grouped(names)
        assert list(found) == [described["weight"]]
        parts = found[described["weight"]]
        assert set(parts.values()) == names
        weight = method.read({role: stored.get_tensor(name) for role, name in parts.items()})
        expected = stored.get_tensor("numbers").float()
    scheme = SCHEMES[path.stem]
    assert (weight.scheme.name if isinstance(weight, Blocks) else None) == scheme
    numbers = weight.unpacked() if isinstance(weight, Blocks) else weight
    assert numbers.dtype == torch.float32
    if path.stem in ROUNDED:
        torch.testing.assert_close(numbers, expected, rtol=3e-7, atol=0)
    else:
        assert torch.equal(numbers, expected)

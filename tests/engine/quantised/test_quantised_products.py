"""A layer whose weight was read as blocks multiplies as one with the float32 numbers of the weight does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.held_weight import HeldWeight

from engine.native.library import load_library
from engine.native.products import Products
from engine.packed.modules import PackedEmbedding, PackedLinear, pack
from engine.packed.schemes import Blocks
from engine.quantised import method_of

FILES = sorted((Path(__file__).parents[2] / "data" / "quantised").glob("*.safetensors"))


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Products:
    return Products(load_library(tmp_path_factory.getbasetemp() / "native"), threads=1)


def read(path: Path) -> tuple[Blocks | torch.Tensor, torch.Tensor]:
    """The weight of a file, and its numbers by the tool that wrote it."""
    with safe_open(path, "pt") as stored:
        described = stored.metadata()
        method = method_of(json.loads(described["quantization_config"]))
        (parts,) = method.grouped(set(stored.keys()) - {"numbers"}).values()
        weight = method.read({role: stored.get_tensor(name) for role, name in parts.items()})
        return weight, stored.get_tensor("numbers").float()


PACKED = [path for path in FILES if path.stem != "bitsandbytes_fp4_64"]


@pytest.mark.parametrize("path", PACKED, ids=lambda path: path.stem)
def test_products_are_those_of_the_numbers(path: Path, products: Products) -> None:
    blocks, numbers = read(path)
    assert isinstance(blocks, Blocks)
    rows, columns = numbers.shape
    linear = torch.nn.Linear(columns, rows)
    assert pack(linear, "weight", HeldWeight(blocks), torch.float32, products.product_of)
    assert isinstance(linear, PackedLinear)
    linear.is_loading = False
    source = torch.randn(5, columns, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.linear(source, numbers, linear.bias)
    torch.testing.assert_close(linear(source), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear.weight, numbers, rtol=3e-7, atol=0)

    table = torch.nn.Embedding(rows, columns)
    assert pack(table, "weight", HeldWeight(blocks), torch.float32, products.product_of)
    assert isinstance(table, PackedEmbedding)
    tokens = torch.tensor([[3, 0], [7, 3]])
    torch.testing.assert_close(table(tokens), numbers[tokens], rtol=3e-7, atol=0)


def test_some_have_inputs_out_of_order() -> None:
    ordered = [path.stem for path in PACKED if isinstance(found := read(path)[0], Blocks) and found.order is not None]
    assert ordered == ["gptqmodel_gptq", "gptqmodel_gptq_v2"]

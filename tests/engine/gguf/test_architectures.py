"""Every architecture of the table: a file as llama.cpp's converter writes it gives the model that was written.

The logits are those of the model of transformers itself, and those of llama.cpp, where its package is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.gguf_converter import converted, quantised, unquantised, write_gguf
from support.gguf_families import FAMILIES, Family
from support.llama_cpp import ask, python
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from engine.gguf.architectures import ARCHITECTURES, changes_of, config_of
from engine.gguf.header import read_header
from engine.gguf.weights import stored_weights
from engine.native.library import load_library
from engine.native.products import Products
from engine.packed.loading import load_stored
from engine.packed.modules import MakeProduct, num_parameters

BLOCKS = {"attn|embd|ssm|output": "Q8_0", "exps": "Q4_0", "ffn": "Q4_0"}
PROMPTS = ([5, 9, 40, 77, 3, 120, 250, 11], [64, 65, 66, 67, 100, 101, 5, 5, 200, 300, 17, 33, 90, 110], [7])


def load(path: Path, make: MakeProduct | None = None) -> tuple[Any, dict[str, Any]]:
    """The model of a file, and transformers' report."""
    header = read_header(path)
    config = config_of(header)
    weights = stored_weights(header, changes_of(header, config))
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    found = load_stored(model_class, config, weights, torch.float32, make, attn_implementation="eager")
    return found[0].eval(), found[1]


def logits(model: Any, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    return found


def apart(first: Any, second: Any) -> float:
    """The largest difference of any logits."""
    return max((logits(first, prompt) - logits(second, prompt)).abs().max().item() for prompt in PROMPTS)


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def write(path: Path, family: Family, model: Any) -> tuple[Path, Any, Any]:
    keys, tensors = converted(model, family.architecture, family.keys, family.change)
    data = quantised(tensors, {})
    return write_gguf(path, family.architecture, keys, data), keys, tensors


def test_all_architectures_are_written() -> None:
    assert {each.architecture for each in FAMILIES.values()} == set(ARCHITECTURES)


def test_equals_the_model_that_was_written(tmp_path: Path, family: Family) -> None:
    model = family.model()
    path, _, _ = write(tmp_path / "m.gguf", family, model)
    found, report = load(path)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(found) is type(model)
    scale = max(logits(model, prompt).abs().max().item() for prompt in PROMPTS)
    assert scale > 0.1
    assert apart(found, model) < 2e-5 * max(scale, 1)


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Products:
    return Products(load_library(tmp_path_factory.getbasetemp() / "native"), threads=1)


def test_blocks_equal_their_numbers(tmp_path: Path, family: Family, products: Products) -> None:
    model = family.model()
    keys, tensors = converted(model, family.architecture, family.keys, family.change)
    kinds = {"exps": "MXFP4", **BLOCKS} if family.architecture == "gpt-oss" else BLOCKS
    data = quantised(tensors, kinds)
    packed, _ = load(write_gguf(tmp_path / "b.gguf", family.architecture, keys, data), products.product_of)
    plain, _ = load(write_gguf(tmp_path / "p.gguf", family.architecture, keys, unquantised(data)))
    assert sum(type(module).__name__.startswith("Packed") for module in packed.modules()) > 2
    has_experts = any(hasattr(module, "_apply_gate") for module in plain.modules())
    assert has_experts == any(hasattr(module, "packed_products") for module in packed.modules())
    assert num_parameters(packed) == num_parameters(plain)
    scale = max(logits(plain, prompt).abs().max().item() for prompt in PROMPTS)
    assert apart(packed, plain) < 1e-5 * max(scale, 1)


class LookedUp(nn.Module):  # type: ignore[misc]
    """GELU as llama.cpp computes it: from a table of half-precision numbers (ggml, ``ggml_table_gelu_f16``)."""

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        return functional.gelu(source.half().float(), approximate="tanh").half().float()


def as_llama_cpp(model: Any) -> Any:
    """The model with what llama.cpp is known to compute otherwise than the published one."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if "GELU" in type(child).__name__:
                setattr(module, name, LookedUp())
    told = getattr(model.config, "rope_parameters", None) or {}
    if told.get("truncate") is False:  # llama.cpp's yarn always rounds the ends of its range
        told["truncate"] = True
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


# llama.cpp scores groups of experts as DeepSeek V3 does, by two of each; V2 was published with the best of each.
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deepseek v2"], indirect=True)
def test_llama_cpp_computes_the_same(tmp_path: Path, family: Family) -> None:
    python()
    path, _, _ = write(tmp_path / "m.gguf", family, family.model())
    model = as_llama_cpp(family.model())
    worst = 0.0
    for prompt, steps in zip(PROMPTS, ask(path, 4, PROMPTS), strict=True):
        text = list(prompt)
        for token, found in steps:
            expected = logits(model, text)[-1].log_softmax(-1)
            worst = max(worst, (torch.tensor(found) - expected).abs().max().item())
            assert expected.max() - expected[token] < 2e-3
            text.append(token)
    print(f"apart: {worst:.1e}")
    assert worst < 1e-3

"""Mixtures in GGUF files through the native forward: experts stay in blocks, and equal those in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support.gguf_converter import converted, quantised, unquantised, vocabulary, write_gguf
from support.gguf_families import FAMILIES, Family
from support.native import NativeModel, compile_once
from support.paged import MOE_TOLERANCE, apart, plain_logits, texts
from support.panels import columns_of, gguf_type, random_blocks
from transformers import AutoModelForCausalLM

from engine.gguf.architectures import changes_of, config_of
from engine.gguf.header import read_header
from engine.gguf.prepare import prepare
from engine.gguf.weights import stored_weights
from engine.native.errors import DifferentNumbers, NotNative, WeightsGone
from engine.native.products import PanelProduct
from engine.packed.loading import load_stored

pytestmark = pytest.mark.reference
code = pytest.fixture(autouse=True)(compile_once)

BLOCKS = {"ffn_down_exps": "Q5_0", "exps": "Q4_0", "attn|embd|output": "Q8_0", "ffn": "Q4_1"}
KINDS = {
    "qwen3moe": BLOCKS,
    "qwen2moe": BLOCKS,
    "granitemoe with a shared expert": BLOCKS,
    "glm4moe": BLOCKS,
    "minimax-m2": BLOCKS,
    "gpt-oss": {**BLOCKS, "ffn_down_exps": "MXFP4", "exps": "MXFP4"},
    "only what follows the gate": {"ffn_down_exps": "Q8_0"},
}
WIDE = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2}


def family_of(name: str, **more: Any) -> Family:
    own = FAMILIES.get(name, FAMILIES["qwen3moe"])
    return Family(own.architecture, own.model_type, own.keys, own.change, {**own.config, **more})


def plain(path: Path) -> Any:
    """The model of a file as transformers runs it."""
    header = read_header(path)
    config = config_of(header)
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    weights = stored_weights(header, changes_of(header, config))
    return load_stored(model_class, config, weights, torch.float32, None, attn_implementation="eager")[0].eval()


def folder_of(path: Path, family: Family, keys: Any, data: Any) -> Path:
    """A prepared folder."""
    folder = path / "model"
    folder.mkdir()
    learned = vocabulary(len(data["token_embd.weight"][0])), ["! !"]
    prepare(write_gguf(path / "m.gguf", family.architecture, keys, data, "smollm", learned), folder)
    return folder


def written(path: Path, name: str) -> tuple[Path, Any]:
    """The folder of a file in blocks, and the model of the same numbers."""
    family = family_of(name)
    keys, tensors = converted(family.model(), family.architecture, family.keys, family.change)
    data = quantised(tensors, KINDS[name])
    reference = plain(write_gguf(path / "plain.gguf", family.architecture, keys, unquantised(data)))
    return folder_of(path, family, keys, data), reference


def require_equal(native: NativeModel, reference: Any) -> None:
    compared = texts(37, 5, 19)
    expected = [plain_logits(reference, text) for text in compared]
    assert max(float(logits.abs().max()) for logits in expected) > 1
    for chunk in (2, 9, 64):
        for found, logits in zip(native.run(compared, chunk), expected, strict=True):
            assert apart(found, logits) < MOE_TOLERANCE


@pytest.mark.parametrize("name", KINDS)
def test_experts_in_blocks_equal_their_numbers(name: str, tmp_path: Path) -> None:
    require_equal(NativeModel(*written(tmp_path, name)[:1]), plain(tmp_path / "plain.gguf"))


def test_experts_in_k_quants_equal_their_numbers(tmp_path: Path) -> None:
    """Gate and up of one type, what follows of another, as in Q4_K_M."""
    family = family_of("qwen3moe", **WIDE)
    keys, tensors = converted(family.model(), family.architecture, family.keys, family.change)
    kinds = {"ffn_gate_exps": "Q4_K", "ffn_up_exps": "Q4_K", "ffn_down_exps": "Q6_K"}
    data = {name: (weight.numpy(), "F32") for name, weight in tensors.items()}
    for name, (values, _) in data.items():
        kind = next((kind for part, kind in kinds.items() if part in name), None)
        if kind is not None:
            data[name] = (k_quants(values.shape, kind), kind)
    reference = plain(write_gguf(tmp_path / "plain.gguf", family.architecture, keys, unquantised(data)))
    require_equal(NativeModel(folder_of(tmp_path, family, keys, data)), reference)


def k_quants(shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Blocks of any digits, their scales small enough."""
    blocks = random_blocks(kind, int(np.prod(shape[:-1])), shape[-1], notable=False).numpy()
    places = (0, 2) if kind == "Q4_K" else (208,)
    spread = gguf.dequantize(blocks.reshape(len(blocks), -1), gguf_type(kind)).std()
    for place in places:
        halves = blocks[..., place : place + 2].copy().view(np.float16)
        blocks[..., place : place + 2] = (halves * np.float16(0.1 / spread)).view(np.uint8)
    assert columns_of(kind) == 256
    return blocks.reshape(*shape[:-1], -1)


@pytest.mark.parametrize("name", ["qwen2moe", "gpt-oss"])
def test_neighbours_change_nothing_at_all(name: str, tmp_path: Path) -> None:
    native = NativeModel(written(tmp_path, name)[0])
    compared = texts(37, 5, 19, 30)
    for text, beside in zip(compared, native.run(compared, 9), strict=True):
        (alone,) = native.run([text], 40)
        assert beside.keys() & alone.keys()
        assert all(torch.equal(beside[index], alone[index]) for index in beside.keys() & alone.keys())


def test_panels_of_experts_are_held_once(tmp_path: Path) -> None:
    """Those that torch multiplied by, and no copy of them."""
    modules: list[Any] = []
    native = NativeModel(written(tmp_path, "gpt-oss")[0], change=modules.append)
    products = [
        product
        for layer in modules[0].model.layers
        for products in layer.mlp.experts.packed_products.values()
        for product in products
    ]
    held = {one.data_ptr() for one in native.runner.decoder.kept if isinstance(one, torch.Tensor)}
    assert len(products) == 16
    assert all(product.panels.data.data_ptr() in held for product in products)


def test_experts_in_blocks_that_give_one_percent_more_are_seen(tmp_path: Path) -> None:
    def change(module: Any) -> None:
        experts = module.model.layers[1].mlp.experts
        experts.register_forward_hook(lambda _module, _inputs, output: output * 1.01)

    with pytest.raises(NotNative, match="differs from the formula") as refusal:
        NativeModel(written(tmp_path, "gpt-oss")[0], change=change)
    assert not isinstance(refusal.value, WeightsGone)


def test_panels_of_another_expert_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C code's own addresses, not those of torch."""
    from engine.native.decoder import _Description

    own = _Description._packed

    def exchanged(self: Any, expert: Any) -> Any:
        assert isinstance(expert.weight, PanelProduct)
        return own(self, expert._replace(weight=first.setdefault(expert.weight.columns, expert.weight)))

    first: dict[int, PanelProduct] = {}
    monkeypatch.setattr(_Description, "_packed", exchanged)
    with pytest.raises(DifferentNumbers, match="its logits differ from the model's own"):
        NativeModel(written(tmp_path, "gpt-oss")[0])

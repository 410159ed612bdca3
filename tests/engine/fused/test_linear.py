"""Fused linears: which are, that nothing changes by it, and what is left alone."""

from __future__ import annotations

import random
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paged import PagedModel, lively_model_folder, plain_logits, plain_model
from support.tiny import tiny_model_folder
from torch import nn

from engine.api.engine import EngineConfig
from engine.fused.linear import FuseLinears, LinearGroup
from engine.model.loader import LoadedModel, load_model
from engine.model.rewrites import apply_rewrites

JOINED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
HYBRID = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
SHARED_KV = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8}
# The number of groups that are joined in four layers.
FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "llama": (8, {}),
    "qwen2": (8, {}),
    "qwen3": (8, {}),
    "mistral": (8, {"sliding_window": 8}),
    "gemma2": (8, {**HYBRID, "query_pre_attn_scalar": 5}),
    "gemma3_text": (8, {**HYBRID, "query_pre_attn_scalar": 5}),
    # Layers that share keys and values of others compute queries alone.
    "gemma4_text": (6, {**HYBRID, **SHARED_KV, "global_head_dim": 32}),
    "phi3": (0, {}),
    "gpt_oss": (4, {**HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (4, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "gpt2": (0, {}),
}


def fuse(model: LoadedModel) -> int:
    return apply_rewrites(model, [FuseLinears()])


@pytest.mark.parametrize("family", FAMILIES)
def test_joined_weights_change_nothing(family: str, tmp_path: Path) -> None:
    joined, config = FAMILIES[family]
    folder = lively_model_folder(tmp_path, family, **config)
    counts: list[int] = []
    probed = load_model(EngineConfig(path=str(folder), device="cpu", dtype="float32"), lambda stage, done: None)
    model = PagedModel(folder, change=lambda module: counts.append(fuse(replace(probed, module=module))))
    assert counts == [joined]
    plain = plain_model(folder)
    rnd = random.Random(0)
    texts = [[rnd.randrange(3, 256) for _ in range(length)] for length in (37, 5, 19)]
    for found, text in zip(model.run(texts), texts, strict=True):
        expected = plain_logits(plain, text)
        assert found
        assert all((row - expected[index]).abs().max() < 1e-4 for index, row in found.items())


def loaded(folder: Path, **config: Any) -> LoadedModel:
    tiny_model_folder(folder, **config)
    return load_model(EngineConfig(path=str(folder), device="cpu", dtype="float32"), lambda stage, done: None)


@pytest.mark.parametrize("bias", [False, True])
def test_the_parameters_are_the_same_numbers_in_fewer_tensors(bias: bool, tmp_path: Path) -> None:
    model = loaded(tmp_path, attention_bias=bias, mlp_bias=bias)
    before = {name: layer.weight.clone() for name, layer in model.module.named_modules() if name.endswith("_proj")}
    count = sum(parameter.numel() for parameter in model.module.parameters())
    assert fuse(model) == 4
    after = {name: layer.weight for name, layer in model.module.named_modules() if name.endswith("_proj")}
    assert sum(parameter.numel() for parameter in model.module.parameters()) == count
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_another_input_and_another_order_are_computed_alone(tmp_path: Path) -> None:
    model = loaded(tmp_path, attention_bias=True)
    attention = model.module.model.layers[0].self_attn
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    fuse(model)
    a, b = torch.randn(1, 3, 64), torch.randn(1, 5, 64)
    with torch.inference_mode():
        torch.testing.assert_close(attention.k_proj(b), layers[1](b))
        attention.q_proj(a)
        torch.testing.assert_close(attention.k_proj(b), layers[1](b))
        torch.testing.assert_close(attention.v_proj(a), layers[2](a))
        torch.testing.assert_close(attention.v_proj(a), layers[2](a))
        torch.testing.assert_close(attention.k_proj(a), layers[1](a))


def test_layers_that_are_more_than_linear_are_left_alone(tmp_path: Path) -> None:
    class Special(nn.Linear):
        pass

    model = loaded(tmp_path)
    first, second = model.module.model.layers
    first.self_attn.k_proj = first.self_attn.v_proj = Special(64, 32, bias=False)
    second.mlp.up_proj.register_forward_hook(lambda layer, inputs, output: output * 2)
    assert fuse(model) == 2
    assert isinstance(first.self_attn.q_proj, nn.Linear)
    assert isinstance(second.mlp.gate_proj, nn.Linear)


def test_no_more_than_one_group_is_held_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(tmp_path, num_hidden_layers=6)
    originals = [weakref.ref(layer) for name, layer in model.module.named_modules() if name.endswith(JOINED)]
    alive: list[int] = []
    stand_ins = FuseLinears.stand_ins

    def counting(rewrite: FuseLinears, place: LinearGroup) -> list[list[nn.Module]]:
        alive.append(sum(layer() is not None for layer in originals))
        return stand_ins(rewrite, place)

    monkeypatch.setattr(FuseLinears, "stand_ins", counting)
    assert fuse(model) == 12
    assert len(originals) == 6 * 5
    # A layer's queries, keys and values are a group, its gate and up another; the last one is still at hand.
    assert all(left <= 30 - 5 * (done // 2) + 3 for done, left in enumerate(alive))
    assert not any(layer() for layer in originals)


def test_numbers_that_differ_undo_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = loaded(tmp_path)
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts, **where: cat(parts, **where) * 1.001)
    assert fuse(model) == 0
    assert isinstance(model.module.model.layers[0].mlp.gate_proj, nn.Linear)
    assert "4 of the groups of linears that share an input are not fused: a stand-in differs by" in caplog.text

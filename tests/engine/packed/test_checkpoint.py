"""Quantised safetensors, as they are published, give the logits of the numbers of their weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.paged import apart, plain_logits, plain_model
from support.published import FP8, edit_config, published_fp8, published_mxfp4, saved_small
from transformers import AutoModelForImageTextToText

from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.model import loader
from engine.model.eligibility import config_of, described, method_of_model
from engine.model.loader import load_model
from engine.native.products import knows
from engine.packed.checkpoint import weights_of
from engine.packed.folder import header_of, held_of
from engine.packed.modules import PackedEmbedding, num_parameters
from engine.packed.published_schemes import BF16

TEXT = [5, 9, 40, 77, 3, 120, 250, 11]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.getbasetemp() / "castor")


def load(folder: Path, cache: str, **settings: Any) -> Any:
    config = EngineConfig(**{"path": str(folder), "device": "cpu", "cache_dir": cache, **settings})
    return load_model(config, lambda *_: None).module


def logits(module: Any) -> dict[int, torch.Tensor]:
    module.set_attn_implementation("eager")
    with torch.inference_mode():
        found = module(input_ids=torch.tensor([TEXT]), use_cache=False).logits[0]
    return dict(enumerate(found))


def difference(module: Any, plain: Any) -> float:
    """The largest difference of any logit, as a share of the largest one."""
    expected = plain_logits(plain, TEXT)
    assert expected.abs().max() > 0.1
    return apart(logits(module), expected) / expected.abs().max().item()


MIXTURE = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any], Callable[[Path], Path]]] = {
    "llama": ("llama", {}, published_fp8),
    "tied": ("qwen3", {"tie_word_embeddings": True}, published_fp8),
    "joined maps": ("phi3", {}, published_fp8),
    "experts, singly": ("qwen3_moe", MIXTURE, published_fp8),
    "experts, in stacks": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}, published_mxfp4),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_published_model_gives_its_own_logits(tmp_path: Path, name: str, cache: str) -> None:
    model_type, settings, publish = FAMILIES[name]
    folder = saved_small(tmp_path / "m", model_type, **settings)
    unpacked = plain_model(publish(folder))
    module = load(folder, cache)
    untied = 320 * 128 if name == "tied" and not knows(BF16, (320, 128)) else 0
    assert num_parameters(module) == untied + sum(weight.numel() for weight in unpacked.parameters())
    assert isinstance(module.get_input_embeddings(), PackedEmbedding)
    assert difference(module, unpacked) < 1e-5
    if name == "experts, in stacks":
        experts = module.model.layers[0].mlp.experts
        assert set(experts.packed_products) == {"gate_up_proj", "down_proj"}
    assert not hasattr(module.config, "quantization_config")


def test_in_another_type_everything_is_unpacked(tmp_path: Path, cache: str) -> None:
    folder = saved_small(tmp_path / "m", "gpt_oss", num_local_experts=4, num_experts_per_tok=2)
    unpacked = plain_model(published_mxfp4(folder)).bfloat16()
    module = load(folder, cache, dtype="bfloat16")
    assert {weight.dtype for weight in module.parameters()} == {torch.bfloat16}
    expected = unpacked.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in module.state_dict().items())
    plain = load(folder, cache, native=False)
    assert type(plain.get_input_embeddings()) is torch.nn.Embedding
    assert plain.state_dict().keys() == expected.keys()


def test_the_text_part_of_a_composite_is_found(tmp_path: Path, cache: str) -> None:
    """As Qwen2.5-VL is published: other names than those of the class, and a tower that is not quantised."""
    folder = saved_small(tmp_path / "m", "qwen2_5_vl")
    names = load_file(folder / "model.safetensors").keys()
    assert {name.partition(".")[0] for name in names} == {"model", "lm_head", "visual"}
    unpacked = published_fp8(folder)
    module = load(folder, cache)
    plain = AutoModelForImageTextToText.from_pretrained(unpacked, attn_implementation="eager", dtype=torch.float32)
    assert type(module).__name__ == type(plain).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert difference(module, plain.eval()) < 1e-5


def test_experts_of_a_class_with_stacks_may_lie_singly(tmp_path: Path, cache: str) -> None:
    """As tools that quantise write Qwen3-VL's, whose own checkpoints have stacks."""
    folder = saved_small(tmp_path / "m", "qwen3_vl_moe", **{**MIXTURE, "num_experts": 4})
    weights = load_file(folder / "model.safetensors")
    stacks = [name for name in weights if re.search("experts.(gate_up|down)_proj", name)]
    assert len(stacks) == 4
    for name in stacks:
        for index, expert in enumerate(weights.pop(name)):
            halves = {"gate_proj": expert[:64], "up_proj": expert[64:]}
            parts = halves if "gate_up" in name else {"down_proj": expert}
            for part, rows in parts.items():
                own = re.sub("experts.*", f"experts.{index}.{part}.weight", name)
                weights[own] = rows.contiguous().clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    unpacked = published_fp8(folder)
    numbers = load_file(unpacked / "model.safetensors")
    for name in stacks:
        parts = ["gate_proj", "up_proj"] if "gate_up" in name else ["down_proj"]
        owns = [[re.sub("experts.*", f"experts.{one}.{part}.weight", name) for part in parts] for one in range(4)]
        numbers[name] = torch.stack([torch.cat([numbers.pop(one) for one in own]) for own in owns])
    save_file(numbers, unpacked / "model.safetensors", {"format": "pt"})
    plain = AutoModelForImageTextToText.from_pretrained(unpacked, attn_implementation="eager", dtype=torch.float32)
    assert difference(load(folder, cache), plain.eval()) < 1e-5


def test_a_checkpoint_in_several_files_is_read_by_its_index(tmp_path: Path, cache: str) -> None:
    folder = saved_small(tmp_path / "m", "llama")
    unpacked = published_fp8(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert difference(load(folder, cache), plain_model(unpacked)) < 1e-5
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ModelRefused, match=r"model-1.safetensors is missing; copy or download it again"):
        load(folder, cache)


def test_a_weight_is_unpacked_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many threads transformers reads with: at no time are two weights held twice."""
    from engine.packed import checkpoint

    folder = saved_small(tmp_path / "m", "qwen3_moe", **MIXTURE)
    published_fp8(folder)
    at_once: list[int] = [0, 0]
    numbers = checkpoint.CheckpointWeight.numbers

    def counted(self: checkpoint.CheckpointWeight, dtype: torch.dtype) -> torch.Tensor:
        at_once[0] += 1
        at_once[1] = max(at_once)
        try:
            return numbers(self, dtype)
        finally:
            at_once[0] -= 1

    monkeypatch.setattr(checkpoint.CheckpointWeight, "numbers", counted)
    load(folder, "", dtype="bfloat16", cache_dir=None)
    assert at_once == [0, 1]


# What would be read wrongly


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop(f"{DOWN}_scale_inv"), rf"has {DOWN} in F8_E4M3, but its quantization_config does not say how"),
        (lambda w: w.update({DOWN: w[DOWN].contiguous().view(128, 192)[:64].clone()}), rf"{DOWN}"),
        (
            lambda w: w.update({"model.layers.0.mlp.down_proj.extra": torch.ones(3)}),
            "has a tensor model.layers.0.mlp.down_proj.extra that LlamaForCausalLM has no place for",
        ),
        (
            lambda w: w.update({"model.layers.0.mlp.down_proj.bias": torch.ones(128)}),
            "has a tensor model.layers.0.mlp.down_proj.bias that LlamaForCausalLM has no place for",
        ),
        (lambda w: w.pop("model.norm.weight"), "lacks 1 weights of llama, among them model.norm.weight"),
    ],
    ids=["no scale", "another shape", "a part of a weight", "a bias", "missing"],
)
def test_what_would_be_read_wrongly_is_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], told: str, cache: str
) -> None:
    folder = saved_small(tmp_path / "m", "llama")
    published_fp8(folder)
    with pytest.raises(ModelRefused, match=told):
        load(changed(folder, change), cache)


def test_what_the_class_does_not_compute_is_left_out(tmp_path: Path, cache: str) -> None:
    """Layers that guess tokens ahead, and biases of zeros, which some tools write for every layer."""
    folder = saved_small(tmp_path / "m", "llama")
    unpacked = published_fp8(folder)
    more = {"model.layers.2.eh_proj.weight": torch.ones(4, 4), "model.layers.0.mlp.down_proj.bias": torch.zeros(128)}
    assert difference(load(changed(folder, lambda w: w.update(more)), cache), plain_model(unpacked)) < 1e-5


def test_a_configuration_of_other_sizes_is_refused(tmp_path: Path, cache: str) -> None:
    folder = saved_small(tmp_path / "m", "gpt_oss", num_local_experts=4, num_experts_per_tok=2)
    published_mxfp4(folder)
    edit_config(folder, intermediate_size=96)
    with pytest.raises(
        ModelRefused, match=r"experts.gate_up_proj as \[4, 384, 128\], but its config.json describes \[4"
    ):
        load(folder, cache)


def test_settings_of_older_tools_are_found_beside_the_configuration(tmp_path: Path) -> None:
    folder = saved_small(tmp_path / "m", "llama")
    settings = {"quant_algo": "UNHEARD_OF", "exclude_modules": ["lm_head"]}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": settings}))
    with pytest.raises(ModelRefused, match=r"quantised weights \(.*modelopt.*are not loaded"):
        method_of_model(config_of(folder))


# Memory


def test_room_counts_what_stays_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    folder = saved_small(tmp_path / "m", "gpt_oss", num_local_experts=4, num_experts_per_tok=2)
    published_mxfp4(folder)
    config, settings = config_of(folder), EngineConfig(str(folder), device="cpu", cache_dir=cache)
    held = held_of(header_of(folder), config, settings)
    assert held is not None
    assert "MXFP4" in held.kinds()
    size = held.bytes_in_blocks()
    experts = 2 * 4 * (384 * 128 + 128 * 192) // 32 * 17
    rest = sum(weight.numel() for name, weight in described(config).named_parameters() if "experts" not in name)
    biases = 2 * 4 * (384 + 128)
    assert experts + 2 * rest < size <= experts + 4 * (rest + biases)
    monkeypatch.setattr(loader, "free_bytes", lambda _device: size - 1)
    with pytest.raises(ModelRefused, match="in blocks, which do not fit"):
        load_model(settings, lambda *_: None)
    monkeypatch.setattr(loader, "free_bytes", lambda _device: size)
    assert load_model(settings, lambda *_: None).max_context == 512


def test_nothing_but_headers_is_read_for_names(tmp_path: Path) -> None:
    folder = saved_small(tmp_path / "m", "qwen3_moe", **MIXTURE)
    published_fp8(folder)
    config = config_of(folder)
    model = described(config)
    weights = weights_of(folder, model, method_of_model(config))
    assert weights.keys() == dict(model.named_parameters()).keys()
    gate_up = weights["model.layers.0.mlp.experts.gate_up_proj"]
    assert gate_up.shape() == (12, 128, 128)
    assert FP8["weight_block_size"] == [64, 32]
    blocks = gate_up.blocks()
    assert blocks is not None
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.11.up_proj.weight"
    scales = stored[f"{name}_scale_inv"].repeat_interleave(64, 0).repeat_interleave(32, 1)
    assert torch.equal(blocks.unpacked()[11, 64:], stored[name].float() * scales)

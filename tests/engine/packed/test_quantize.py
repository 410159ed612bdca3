"""``quantize`` packs safetensors at the load: the logits are those of the numbers that the blocks stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.gguf_files import write_tiny_gguf
from support.paged import apart, plain_logits, plain_model
from support.published import edit_config, published_fp8, saved_small
from torch import nn
from transformers import AutoModelForCausalLM

from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.gguf.prepare import prepare
from engine.model import loader
from engine.model.eligibility import config_of, described
from engine.model.loader import load_model
from engine.packed.encoders import in_blocks
from engine.packed.folder import Planned, header_of, held_of
from engine.packed.modules import is_packed, num_parameters
from engine.packed.places import places_of
from engine.packed.schemes import BY_NAME

TEXT = [5, 9, 40, 77, 3, 120, 250, 11]
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHARED = {"shared_expert_intermediate_size": 64, "decoder_sparse_step": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "experts, singly": ("qwen3_moe", MIXTURE),
    "experts, transposed": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "a gate of one row": ("qwen2_moe", {**MIXTURE, **SHARED}),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.getbasetemp() / "castor")


def load(folder: Path, cache: str, **settings: Any) -> Any:
    config = EngineConfig(**{"path": str(folder), "device": "cpu", "cache_dir": cache, **settings})
    module = load_model(config, lambda *_: None).module
    module.set_attn_implementation("eager")
    return module


def rounded(folder: Path, choice: str) -> tuple[Any, set[str]]:
    """The model with what blocks make of its weights, and the names of those."""
    model: Any = plain_model(folder)
    chosen: set[str] = set()
    for name, place in places_of(model).items():
        scheme = place.scheme(choice)
        if scheme is None or name in model.all_tied_weights_keys:
            continue
        weight = model.get_parameter(name).data
        found = in_blocks(weight.mT if place.transposed else weight, scheme).unpacked()
        weight.copy_(found.mT if place.transposed else found)
        chosen.add(name)
    return model, chosen


@pytest.mark.parametrize("choice", ["q8", "q4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_blocks(tmp_path: Path, name: str, choice: str, cache: str) -> None:
    model_type, settings = FAMILIES[name]
    folder = saved_small(tmp_path / "m", model_type, **settings)
    expected, chosen = rounded(folder, choice)
    found = load(folder, cache, quantize=choice)
    assert num_parameters(found) == num_parameters(expected)
    held = {f"{place}.{own}" for place, part in found.named_modules() for own in getattr(part, "packed", {})}
    assert held - found.all_tied_weights_keys.keys() - {"lm_head.weight"} == chosen - {"lm_head.weight"}
    wanted = plain_logits(expected, TEXT)
    with torch.inference_mode():
        logits = found(input_ids=torch.tensor([TEXT]), use_cache=False).logits[0]
    assert apart(dict(enumerate(logits)), wanted) < 1e-5 * wanted.abs().max().item()
    assert apart(dict(enumerate(logits)), plain_logits(plain_model(folder), TEXT)) > 1e-3 * wanted.abs().max().item()


def test_what_decides_much_stays_as_it_is(tmp_path: Path) -> None:
    folder = saved_small(tmp_path / "m", "qwen2_moe", **MIXTURE, **SHARED)
    places = places_of(described(config_of(folder)))
    schemes = {name: scheme.name for name, place in places.items() if (scheme := place.scheme("q4")) is not None}
    layer = "model.layers.0."
    kept = {name.removeprefix(layer) for name in places.keys() - schemes.keys() if name.startswith(layer)}
    assert {"mlp.gate.weight", "mlp.shared_expert_gate.weight", "input_layernorm.weight"} <= kept
    assert all("norm" in name or "gate.weight" in name or "bias" in name for name in kept)
    assert {name for name, scheme in schemes.items() if scheme == "Q8_0"} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    fp8 = {name: place.scheme("fp8") for name, place in places.items()}
    assert fp8["lm_head.weight"] is fp8["model.embed_tokens.weight"] is None
    assert fp8[layer + "self_attn.o_proj.weight"].name == "F8_128"  # type: ignore[union-attr]
    assert fp8[layer + "mlp.experts.down_proj"].name == "F8_32"  # type: ignore[union-attr]
    assert {place.scheme("none") for place in places.values()} == {None}


def test_columns_that_are_no_whole_blocks_stay_numbers(tmp_path: Path, cache: str) -> None:
    folder = saved_small(tmp_path / "m", "llama", intermediate_size=200)
    found = load(folder, cache, quantize="q8")
    mlp = found.model.layers[0].mlp
    assert type(mlp.down_proj) is nn.Linear
    assert is_packed(mlp.up_proj)


def test_fp8_is_packed(tmp_path: Path, cache: str) -> None:
    folder = saved_small(tmp_path / "m", "llama")
    expected, _ = rounded(folder, "fp8")
    wanted = plain_logits(expected, TEXT)
    with torch.inference_mode():
        logits = load(folder, cache, quantize="fp8")(input_ids=torch.tensor([TEXT]), use_cache=False).logits[0]
    assert apart(dict(enumerate(logits)), wanted) < 1e-5 * wanted.abs().max().item()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"dtype": "bfloat16"}, "only the C code computes with blocks, in float32; leave dtype and native out"),
        ({"native": False}, "only the C code computes with blocks, in float32; leave dtype and native out"),
    ],
    ids=["bfloat16", "without C code"],
)
def test_what_cannot_be_packed_is_refused(tmp_path: Path, settings: dict[str, Any], told: str, cache: str) -> None:
    folder = saved_small(tmp_path / "m", "llama")
    with pytest.raises(ModelRefused, match=f"^quantize is 'q8', but {told}$"):
        load(folder, cache, quantize="q8", **settings)


def test_a_gpu_is_told_what_it_computes_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    folder = saved_small(tmp_path / "m", "llama")
    monkeypatch.setattr(loader, "resolve_device", lambda _name: torch.device("cuda", 0))
    monkeypatch.setattr(loader, "take_first_memory", lambda _device: None)
    with pytest.raises(ModelRefused, match="a GPU computes with blocks in bfloat16 or float16, by Triton; leave"):
        load(folder, cache, quantize="q8", dtype="float32")


def test_weights_are_not_quantised_twice(tmp_path: Path, cache: str) -> None:
    file, made = write_tiny_gguf(tmp_path / "m.gguf"), tmp_path / "made"
    made.mkdir()
    prepare(file, made)
    with pytest.raises(ModelRefused, match="but the weights of a GGUF file are quantised already; leave quantize out"):
        load(made, cache, quantize="q8")
    folder = saved_small(tmp_path / "m", "llama")
    published_fp8(folder)
    with pytest.raises(ModelRefused, match=r"the weights are quantised already \(FP8 .*\); leave quantize out"):
        load(folder, cache, quantize="q8")


def test_a_weight_that_no_block_holds_is_named(tmp_path: Path, cache: str) -> None:
    folder = saved_small(tmp_path / "m", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.inf
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelRefused, match=r"model.layers.1.mlp.up_proj.weight: .* not finite"):
        load(folder, cache, quantize="q8")


@pytest.mark.parametrize("choice", ["q8", "q4"])
def test_room_is_what_is_planned(tmp_path: Path, choice: str) -> None:
    folder = saved_small(tmp_path / "m", "qwen3_moe", **MIXTURE, tie_word_embeddings=True)
    config = config_of(folder)
    planned = Planned(described(config), choice)
    held = held_of(header_of(folder), config, EngineConfig(str(folder), quantize=choice))
    assert held is not None
    assert held.bytes_in_blocks() == planned.bytes_in_blocks()
    assert held.kinds() == planned.kinds() == ("blocks of Q8_0" if choice == "q8" else "blocks of Q4_0, Q8_0")
    size, bits = num_parameters(described(config)), {"q8": 8.5, "q4": 4.5}[choice]
    assert size * bits / 8 < planned.bytes_in_blocks() < size * (bits + 4) / 8


def test_weights_in_bfloat16_are_rounded_once(tmp_path: Path, cache: str) -> None:
    folder = saved_small(tmp_path / "m", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    edit_config(folder, dtype="bfloat16")
    module = load(folder, cache, quantize="q4").model.layers[1].mlp.down_proj
    expected = in_blocks(model.model.layers[1].mlp.down_proj.weight.detach(), BY_NAME["Q4_0"])
    assert torch.equal(module.blocks.data, expected.data)

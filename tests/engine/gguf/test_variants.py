"""What files of one architecture write in different ways, and what is refused of them by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gguf_converter import Keys, Tensors, converted, quantised, write_gguf
from support.gguf_families import FAMILIES
from transformers import AutoModelForCausalLM

from engine.gguf.architectures import changes_of, config_of
from engine.gguf.header import Unreadable, read_header
from engine.gguf.weights import stored_weights
from engine.packed.loading import load_stored

PROMPT = torch.tensor([[5, 9, 40, 77, 3, 120, 250, 11]])


def rewritten(path: Path, name: str, change: Callable[[Keys, Tensors], None]) -> Path:
    """A file of a family, in another form."""
    family = FAMILIES[name]
    keys, tensors = converted(family.model(), family.architecture, family.keys, family.change)
    change(keys, tensors)
    return write_gguf(path / "m.gguf", family.architecture, keys, quantised(tensors, {}))


def fused(_keys: Keys, tensors: Tensors) -> None:
    """Gates and ups of experts in one tensor, as the converter can be told to."""
    for name in [name for name in tensors if "ffn_gate_exps" in name]:
        both = [tensors.pop(name), tensors.pop(name.replace("gate", "up"))]
        tensors[name.replace("gate_exps", "gate_up_exps")] = torch.cat(both, dim=1)


def older_latents(keys: Keys, tensors: Tensors) -> None:
    """Before llama.cpp multiplied queries by the map to keys: one map, and the sizes of whole heads."""
    for layer in range(2):
        key, value = (tensors.pop(f"blk.{layer}.attn_{part}_b.weight") for part in ("k", "v"))
        joined = torch.cat([key.transpose(1, 2), value], dim=1).flatten(0, 1)
        tensors[f"blk.{layer}.attn_kv_b.weight"] = joined.contiguous()
        if (bias := tensors.pop(f"blk.{layer}.exp_probs_b.bias", None)) is not None:
            tensors[f"blk.{layer}.exp_probs_b"] = bias
    for part in ("key", "value"):
        keys[f"deepseek2.attention.{part}_length"] = keys.pop(f"deepseek2.attention.{part}_length_mla")
    keys["deepseek2.attention.head_count_kv"] = keys["deepseek2.attention.head_count"]


def further_token(keys: Keys, tensors: Tensors) -> None:
    """A layer more, which predicts the token after the next."""
    keys |= {"glm4moe.block_count": 3, "glm4moe.nextn_predict_layers": 1}
    tensors |= {name.replace("blk.1.", "blk.2."): each for name, each in tensors.items() if name.startswith("blk.1.")}
    tensors["blk.2.nextn.eh_proj.weight"] = torch.zeros(64, 128)


@pytest.mark.parametrize(
    ("name", "change"),
    [("qwen3moe", fused), ("deepseek v3", older_latents), ("glm4moe", further_token), ("mixtral", fused)],
)
def test_another_form_is_the_same_model(tmp_path: Path, name: str, change: Any) -> None:
    header = read_header(rewritten(tmp_path, name, change))
    config = config_of(header)
    weights = stored_weights(header, changes_of(header, config))
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    found, report = load_stored(model_class, config, weights, torch.float32, None, attn_implementation="eager")
    assert not report["missing_keys"]
    with torch.inference_mode():
        difference = found.eval()(PROMPT, use_cache=False).logits - FAMILIES[name].model()(PROMPT).logits
    assert difference.abs().max() < 2e-5


def factors(value: float) -> Callable[[Keys, Tensors], None]:
    def change(_keys: Keys, tensors: Tensors) -> None:
        tensors["rope_freqs.weight"] = torch.full_like(tensors["rope_freqs.weight"], value)

    return change


def key(name: str, value: Any) -> Callable[[Keys, Tensors], None]:
    return lambda keys, _tensors: keys.update({name: value})


REFUSED = {
    "rope_freqs.weight are not the factors of Llama 3": ("llama 3.1", factors(3.0)),
    "rope_freqs.weight are not those of a head that is rotated in part": ("gemma4 e2b", factors(3.0)),
    "rope.scaling.yarn_ext_factor is not 1": ("qwen3 with yarn", key("qwen3.rope.scaling.yarn_ext_factor", 0.5)),
    "rotary scaling 'dynamic' is not known": ("qwen3", key("qwen3.rope.scaling.type", "dynamic")),
    "it has no tensor rope_factors_short.weight": (
        "phi3 with longrope",
        lambda _k, t: t.pop("rope_factors_short.weight"),
    ),
    "rotates nothing": ("granite", key("granite.rope.scaling.finetuned", False)),
    "the scores of its experts, 1, are not those of minimax-m2": (
        "minimax-m2",
        key("minimax-m2.expert_gating_func", 1),
    ),
    "made to sum to one": ("deepseek v2", key("deepseek2.expert_weights_norm", True)),
    "rotate a part of their heads": ("gemma4 e2b", key("gemma4.rope.dimension_count_swa", 8)),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, sentence: str) -> None:
    name, change = REFUSED[sentence]
    with pytest.raises(Unreadable, match=sentence):
        config_of(read_header(rewritten(tmp_path, name, change)))


def stored(path: Path, name: str, kinds: dict[str, str]) -> Any:
    """The weights of a file of a family whose tensors are in blocks."""
    family = FAMILIES[name]
    keys, tensors = converted(family.model(), family.architecture, family.keys, family.change)
    header = read_header(write_gguf(path / "m.gguf", family.architecture, keys, quantised(tensors, kinds)))
    return stored_weights(header, changes_of(header, config_of(header)))


@pytest.mark.parametrize(("name", "transposed"), [("gpt-oss", True), ("qwen3moe", False), ("nemotron_h_moe", False)])
def test_experts_stay_in_blocks_a_row_for_each_output(tmp_path: Path, name: str, transposed: bool) -> None:
    weights = stored(tmp_path, name, {"exps": "MXFP4"})
    experts = {key: each for key, each in weights.items() if key.endswith((".up_proj", ".gate_up_proj", ".down_proj"))}
    assert len(experts) == 4
    for each in experts.values():
        blocks = each.blocks()
        assert blocks is not None
        rows = blocks.unpacked()
        assert torch.equal(rows.transpose(1, 2) if transposed else rows, each.numbers(torch.float32))


def test_experts_of_two_schemes_are_unpacked(tmp_path: Path) -> None:
    weights = stored(tmp_path, "qwen3moe", {"gate_exps": "Q8_0", "exps": "Q4_0"})
    assert weights["model.layers.0.mlp.experts.gate_up_proj"].blocks() is None
    assert weights["model.layers.0.mlp.experts.gate_up_proj"].numbers(torch.float32).shape == (4, 64, 64)
    assert weights["model.layers.0.mlp.experts.down_proj"].blocks() is not None

"""What the native forward computes beyond Llama: each family equals a plain forward, and what differs is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fates import NATIVE, Fate, find_fate
from support.native import TARGETS, NativeModel, assert_equal, compile_for, compile_once
from support.paged import lively_model_folder, texts
from torch import nn

from engine.native.errors import DifferentNumbers, NotNative, WeightsGone

pytestmark = pytest.mark.reference

HYBRID = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
GRANITE = {
    "attention_multiplier": 0.4,
    "embedding_multiplier": 3.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.6,
}
CAPPED = {**HYBRID, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 0.5}
LOCAL_AND_GLOBAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma", {}),
    "gemma2, soft caps": ("gemma2", CAPPED),
    "gemma3": ("gemma3_text", {**HYBRID, "query_pre_attn_scalar": 5}),
    "gemma3, two rotations": ("gemma3_text", {**HYBRID, "rope_parameters": LOCAL_AND_GLOBAL}),
    "gemma3, the heads of 270M": (
        "gemma3_text",
        {**HYBRID, "head_dim": 256, "num_key_value_heads": 1, "hidden_size": 160, "tie_word_embeddings": True},
    ),
    "phi3": ("phi3", {"sliding_window": 8}),
    "phi3, partly rotated": ("phi3", {"partial_rotary_factor": 0.5}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", HYBRID),
    "granite": ("granite", GRANITE),
    "granite, an odd vocabulary": ("granite", {**GRANITE, "vocab_size": 331, "tie_word_embeddings": True}),
    "smollm3, layers that do not rotate": ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}),
    "ernie4_5, pairs of neighbours": ("ernie4_5", {}),
    "glm4, pairs of neighbours in half of a head": ("glm4", {}),
    "biases of a gated MLP": ("llama", {"mlp_bias": True, "attention_bias": True}),
}
code = pytest.fixture(autouse=True)(compile_once)
target = pytest.fixture(params=TARGETS)(compile_for)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_mixture_of_chunks_equals_a_plain_forward(name: str, tmp_path: Path) -> None:
    family, config = FAMILIES[name]
    assert_equal(lively_model_folder(tmp_path / "model", family, **config), texts(37, 5, 19))


@pytest.mark.parametrize("name", ["gemma2, soft caps", "olmo2", "granite"])
@pytest.mark.usefixtures("target")
def test_lesser_processors_compute_the_same(name: str, tmp_path: Path) -> None:
    family, config = FAMILIES[name]
    assert_equal(lively_model_folder(tmp_path / "model", family, **config), texts(37, 5), chunks=(9,))


@pytest.mark.parametrize("name", ["Gemma3ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"])
def test_the_text_part_of_a_model_with_towers_equals_a_plain_forward(name: str) -> None:
    assert find_fate(name) == Fate(name, NATIVE, "")


def test_a_family_is_computed_alike_beside_others_and_alone(tmp_path: Path) -> None:
    native = NativeModel(lively_model_folder(tmp_path / "model", "gemma2", **CAPPED))
    compared = texts(37, 5, 19, 30)
    for text, beside in zip(compared, native.run(compared, 9), strict=True):
        (alone,) = native.run([text], 40)
        assert beside.keys() & alone.keys()
        assert all(torch.equal(beside[index], alone[index]) for index in beside.keys() & alone.keys())


def larger(name: str) -> Callable[[Any], object]:
    """Have the parts of that name in the third layer, or else of the model, give 1 % more."""

    def change(module: Any) -> None:
        parts = {path: part for path, part in module.named_modules() if path.split(".")[-1] == name}
        part = next((part for path, part in parts.items() if ".2." in path), None) or next(iter(parts.values()))
        part.register_forward_hook(lambda _module, _inputs, output: output * 1.01)

    return change


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("gemma3", "input_layernorm"),
        ("gemma3", "post_attention_layernorm"),
        ("gemma3", "pre_feedforward_layernorm"),
        ("gemma3", "post_feedforward_layernorm"),
        ("gemma3", "q_norm"),
        ("gemma3", "norm"),
        ("olmo2", "k_norm"),
        ("olmo2", "post_feedforward_layernorm"),
        ("phi3", "activation_fn"),
        ("granite", "mlp"),
        ("granite", "embed_tokens"),
    ],
)
def test_a_part_that_gives_one_percent_more_is_seen(name: str, part: str, tmp_path: Path) -> None:
    """Before the weights are packed."""
    family, config = FAMILIES[name]
    with pytest.raises(NotNative, match="differs from") as refusal:
        NativeModel(lively_model_folder(tmp_path / "model", family, **config), change=larger(part))
    assert not isinstance(refusal.value, WeightsGone)


@pytest.mark.parametrize("name", ["gemma2, soft caps", "granite"])
def test_logits_that_are_scaled_otherwise_are_seen(name: str, tmp_path: Path) -> None:
    def scale(_module: Any, _inputs: Any, output: Any) -> None:
        output.logits *= 1.01

    family, config = FAMILIES[name]
    with pytest.raises(NotNative, match="its logits: differs from the formula"):
        NativeModel(
            lively_model_folder(tmp_path / "model", family, **config),
            change=lambda module: module.register_forward_hook(scale),
        )


def test_another_activation_is_seen(tmp_path: Path) -> None:
    """GELU by the error function is within 1e-3 of that by tanh."""

    def change(module: Any) -> None:
        for layer in module.model.layers:
            layer.mlp.act_fn = nn.GELU()

    folder = lively_model_folder(tmp_path / "model", "gemma3_text", 12.0, **HYBRID)
    with pytest.raises(NotNative, match="differs from the formula"):
        NativeModel(folder, change=change)


def test_a_layer_that_rotates_by_other_angles_is_seen(tmp_path: Path) -> None:
    def twist(_module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "position_embeddings": kwargs["position_embeddings"][::-1]}

    def change(module: Any) -> None:
        module.model.layers[2].self_attn.register_forward_pre_hook(twist, with_kwargs=True)

    with pytest.raises(NotNative, match=r"q_proj of model.layers.2.self_attn: differs from the formula"):
        NativeModel(lively_model_folder(tmp_path / "model", "gemma3_text", **HYBRID), change=change)


def test_pairs_of_dimensions_that_are_others_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    own = modeling_llama.rotate_half
    monkeypatch.setattr(modeling_llama, "rotate_half", lambda x: own(x).roll(2, dims=-1))
    with pytest.raises(NotNative, match=r"q_proj of model.layers.0.self_attn: differs from the formula"):
        NativeModel(lively_model_folder(tmp_path / "model", "llama"))


def test_scores_that_are_capped_otherwise_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only attention between tokens shows it."""
    from transformers.models.gemma2 import modeling_gemma2

    own = modeling_gemma2.eager_attention_forward

    def uncapped(*args: Any, softcap: float, **keywords: Any) -> Any:
        return own(*args, **keywords)

    folder = lively_model_folder(tmp_path / "model", "gemma2", **CAPPED)
    monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", uncapped)
    with pytest.raises(DifferentNumbers, match="its logits differ from the model's own"):
        NativeModel(folder)

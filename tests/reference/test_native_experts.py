"""Mixtures of experts through the native forward equal a plain forward, and what differs is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.native import TARGETS, NativeModel, assert_equal, compile_for, compile_once
from support.paged import MOE_TOLERANCE, lively_model_folder, texts

from engine.native.errors import DifferentNumbers, NotNative, WeightsGone
from engine.native.verify import TOKENS

pytestmark = pytest.mark.reference

QWEN = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
GPT_OSS = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
GROUPED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
SHARED = {**QWEN, "shared_expert_intermediate_size": 64}
ERNIE = {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 32, "moe_num_shared_experts": 2}
GRANITE = {"num_local_experts": 8, "num_experts_per_tok": 3, "attention_multiplier": 0.4, "residual_multiplier": 0.6}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {**QWEN, "norm_topk_prob": False}),
    "qwen3_moe, shares of the chosen": ("qwen3_moe", {**QWEN, "norm_topk_prob": True}),
    "qwen3_moe, some layers without experts": ("qwen3_moe", {**QWEN, "mlp_only_layers": [1]}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "olmoe": ("olmoe", {"num_experts": 17, "num_experts_per_tok": 2}),
    "qwen2_moe, a shared expert with a gate": ("qwen2_moe", SHARED),
    "qwen2_moe, an odd number of experts": ("qwen2_moe", {**SHARED, "num_experts": 17, "decoder_sparse_step": 2}),
    "glm4_moe, groups of experts": ("glm4_moe", {**GROUPED, "use_qk_norm": True}),
    "dots1, sigmoids as they are": ("dots1", {**GROUPED, "norm_topk_prob": False}),
    "ernie4_5_moe, a softmax with a correction": ("ernie4_5_moe", ERNIE),
    "exaone_moe": ("exaone_moe", {**QWEN, **GROUPED, "num_shared_experts": 1, "sliding_window": 8}),
    "solar_open": ("solar_open", GROUPED),
    "hy_v3": ("hy_v3", {**QWEN, "num_shared_experts": 1, "router_scaling_factor": 1.5}),
    "minimax_m2": ("minimax_m2", {"num_local_experts": 8, "num_experts_per_tok": 3}),
    "granitemoe": ("granitemoe", GRANITE),
    "granitemoeshared": ("granitemoeshared", {**GRANITE, "shared_intermediate_size": 64}),
    "gpt_oss": ("gpt_oss", GPT_OSS),
    "gpt_oss, yarn and larger heads": ("gpt_oss", {**GPT_OSS, "head_dim": 64, "rope_parameters": YARN}),
}
code = pytest.fixture(autouse=True)(compile_once)
target = pytest.fixture(params=TARGETS)(compile_for)


def folder_of(path: Path, name: str) -> Path:
    family, config = FAMILIES[name]
    return lively_model_folder(path, family, **config)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_mixture_of_chunks_equals_a_plain_forward(name: str, tmp_path: Path) -> None:
    assert_equal(folder_of(tmp_path / "model", name), texts(37, 5, 19), tolerance=MOE_TOLERANCE)


@pytest.mark.usefixtures("target")
def test_lesser_processors_compute_the_same(tmp_path: Path) -> None:
    assert_equal(folder_of(tmp_path / "model", "gpt_oss"), texts(37, 5), chunks=(9,), tolerance=MOE_TOLERANCE)


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "gpt_oss", "qwen2_moe, a shared expert with a gate", "glm4_moe, groups of experts"]
)
def test_neighbours_change_nothing_at_all(name: str, tmp_path: Path) -> None:
    native = NativeModel(folder_of(tmp_path / "model", name))
    compared = texts(37, 5, 19, 30)
    for text, beside in zip(compared, native.run(compared, 9), strict=True):
        (alone,) = native.run([text], 40)
        assert beside.keys() & alone.keys()
        assert all(torch.equal(beside[index], alone[index]) for index in beside.keys() & alone.keys())


def test_no_weights_are_held_twice(tmp_path: Path) -> None:
    modules: list[Any] = []
    NativeModel(folder_of(tmp_path / "model", "gpt_oss"), change=modules.append)
    assert max(weight.numel() for weight in modules[0].parameters()) == 64


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_that_give_one_percent_more_are_seen(name: str, tmp_path: Path) -> None:
    def change(module: Any) -> None:
        experts = module.model.layers[2].mlp.experts
        experts.register_forward_hook(lambda _module, _inputs, output: output * 1.01)

    with pytest.raises(NotNative, match="differs from the formula") as refusal:
        NativeModel(folder_of(tmp_path / "model", name), change=change)
    assert not isinstance(refusal.value, WeightsGone)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("qwen2_moe, a shared expert with a gate", "mlp.shared_expert"),
        ("qwen2_moe, a shared expert with a gate", "mlp.shared_expert_gate"),
        ("glm4_moe, groups of experts", "mlp.shared_experts"),
        ("granitemoeshared", "shared_mlp"),
    ],
)
def test_shared_experts_that_give_more_are_seen(name: str, part: str, tmp_path: Path) -> None:
    def change(module: Any) -> None:
        shared = module.model.layers[2].get_submodule(part)
        shared.register_forward_hook(lambda _module, _inputs, output: output * 1.05)

    with pytest.raises(NotNative, match=r"differs? from"):
        NativeModel(folder_of(tmp_path / "model", name), change=change)


@pytest.mark.parametrize(
    ("part", "other"), [("e_score_correction_bias", torch.zeros(8)), ("topk_group", 4), ("routed_scaling_factor", 1.4)]
)
def test_another_choice_of_experts_is_seen(part: str, other: Any, tmp_path: Path) -> None:
    def change(module: Any) -> None:
        router = module.model.layers[2].mlp.gate
        own, forward = getattr(router, part), router.forward

        def otherwise(values: torch.Tensor) -> Any:
            setattr(router, part, other)
            try:
                return forward(values)
            finally:
                setattr(router, part, own)

        router.forward = otherwise

    with pytest.raises(NotNative, match="differs from the formula"):
        NativeModel(folder_of(tmp_path / "model", "glm4_moe, groups of experts"), change=change)


def weighing_more(module: Any, rows: slice) -> None:
    """Have the router of a layer give some tokens of a check larger weights."""
    mlp = module.model.layers[2].mlp
    router = mlp.router if hasattr(mlp, "router") else mlp.gate

    def weigh(_module: Any, _inputs: Any, output: Any) -> Any:
        scores, shares, chosen = output
        if len(shares) == TOKENS:
            shares = shares.clone()
            shares[rows] *= 1.5
        return scores, shares, chosen

    router.register_forward_hook(weigh)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_other_shares_are_seen_but_for_a_few_tokens(name: str, tmp_path: Path) -> None:
    """Rounding sends a few tokens to other experts."""
    folder = folder_of(tmp_path / "model", name)
    with pytest.raises(NotNative, match="differs from the formula"):
        NativeModel(folder, change=lambda module: weighing_more(module, slice(5)))
    NativeModel(folder, change=lambda module: weighing_more(module, slice(4)))


def test_another_gate_is_seen(tmp_path: Path) -> None:
    def change(module: Any) -> None:
        experts = module.model.layers[0].mlp.experts
        own = experts._apply_gate
        experts._apply_gate = lambda numbers: own(numbers.clamp(max=0.05))

    with pytest.raises(NotNative, match="differs from the formula"):
        NativeModel(folder_of(tmp_path / "model", "gpt_oss"), change=change)


def test_sinks_that_are_not_there_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only attention between tokens shows it."""
    from transformers.models.gpt_oss import modeling_gpt_oss
    from transformers.models.llama.modeling_llama import eager_attention_forward

    folder = folder_of(tmp_path / "model", "gpt_oss")
    monkeypatch.setattr(modeling_gpt_oss, "eager_attention_forward", eager_attention_forward)
    with pytest.raises(DifferentNumbers, match="its logits differ from the model's own"):
        NativeModel(folder)


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("phimoe", {"num_local_experts": 4}, "LayerNorm is not a norm"),
        ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2}, "has the parts .*query_layernorm"),
        ("qwen3_moe", {**QWEN, "moe_intermediate_size": 40}, "do not divide into whole panels and groups"),
    ],
)
def test_other_mixtures_are_left_to_torch(family: str, config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(NotNative, match=reason) as refusal:
        NativeModel(lively_model_folder(tmp_path / "model", family, **config))
    assert not isinstance(refusal.value, WeightsGone)

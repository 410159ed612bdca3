"""Fused RMSNorm and RoPE against the models' own code, and whole models with all that is fused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.paged import PagedModel, lively_model_folder, plain_logits, plain_model
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.phi3 import modeling_phi3

from engine.api.engine import EngineConfig
from engine.api.errors import EngineUnavailable
from engine.attention.gather import ReferenceAttention
from engine.cache.kv_tensors import KVCache
from engine.device import cuda_health
from engine.fused.ops import (
    FusedNorm,
    FuseNorms,
    FuseRotations,
    Rotate,
    RotationPlace,
    fused_rotation,
)
from engine.fused.rewrites import FUSED_OPS
from engine.model.loader import LoadedModel, load_model
from engine.model.probe import Probe
from engine.model.rewrites import apply_rewrites

NORMS: dict[str, Any] = {"llama": LlamaRMSNorm, "gemma2": Gemma2RMSNorm, "gpt_oss": GptOssRMSNorm}
HYBRID = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
# Places in two layers: two norms in each and a last one, or two more around them, or two for queries and keys; the
# rotation, where it is of the usual form; gated MLPs; the
# layers themselves; and attentions whose heads have norms.
FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "llama": (10, {}),
    "qwen2": (10, {}),
    "qwen3": (16, {}),
    "mistral": (10, {"sliding_window": 8}),
    "gemma2": (14, HYBRID),
    "gemma3_text": (20, HYBRID),
    "phi3": (10, {}),
    "granite": (10, {"residual_multiplier": 0.3}),
    "gpt_oss": (8, {**HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (14, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "gpt2": (0, {}),
}


def install_fused_ops(model: LoadedModel) -> int:
    return apply_rewrites(model, FUSED_OPS)


def fused(norm: nn.Module) -> Any:
    """What a model has in place of its ``norm`` after the rewrite."""
    module = nn.ModuleDict({"norm": norm})
    module.device = torch.device("cpu")  # type: ignore[assignment]
    apply_rewrites(LoadedModel(module, Probe([], 0), 0, "", ()), [FuseNorms()])
    return module["norm"]


def rotates_alike(rotate: Rotate) -> bool:
    code = ModuleType("code")
    code.apply_rotary_pos_emb = rotate  # type: ignore[attr-defined]
    rewrite, place = FuseRotations(), RotationPlace(code, 20, torch.zeros(1))
    compared = [rewrite.compare(place, stand_in) for stand_in in rewrite.stand_ins(place)]
    assert sum(apart <= rewrite.tolerance[dtype] for apart, dtype in compared) <= 1
    return any(apart <= rewrite.tolerance[dtype] for apart, dtype in compared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_every_arrangement(name: str, dtype: torch.dtype) -> None:
    norm = NORMS[name](80, eps=1e-5).to(dtype)
    nn.init.normal_(norm.weight)
    ours = fused(norm)
    assert isinstance(ours, FusedNorm)
    rows = torch.randn(1, 7, 5, 80).to(dtype)
    # Flat, one row, heads before tokens, a batch of one row each, a slice of a joined product, and what no two strides
    # can walk.
    sliced = torch.randn(1, 7, 300).to(dtype)[..., 20:100]
    for source in (rows[0], rows[:, :1], rows.transpose(1, 2), rows.transpose(0, 1), sliced):
        with torch.inference_mode():
            torch.testing.assert_close(ours(source), norm(source), rtol=2e-3, atol=1e-5)
            torch.testing.assert_close(
                ours(rows.expand(2, 7, 5, 80)), norm(rows.expand(2, 7, 5, 80)), rtol=2e-3, atol=1e-5
            )


def test_norms_of_another_kind_are_left_alone() -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * 1.01

    odd = OddRMSNorm(16)
    assert fused(odd) is odd
    hooked = LlamaRMSNorm(16)
    hooked.register_forward_hook(lambda module, inputs, output: output)
    assert fused(hooked) is hooked


def test_rotations_and_what_is_none() -> None:
    original = modeling_llama.apply_rotary_pos_emb
    assert rotates_alike(original)
    assert rotates_alike(modeling_gpt_oss.apply_rotary_pos_emb)
    assert not rotates_alike(lambda q, k, cos, sin: original(q, k, sin, cos))
    assert not rotates_alike(lambda x, cos: x)
    ours = fused_rotation(original, halved=False)
    q, k = torch.randn(1, 4, 3, 20), torch.randn(1, 3, 2, 20).transpose(1, 2)
    for size in (20, 10):  # the whole head; less of it is what the model's own code does
        cos, sin = torch.randn(1, 3, size), torch.randn(1, 3, size)
        heads = (q, k) if size == 20 else (q[..., :10], k[..., :10])
        for found, expected in zip(ours(*heads, cos, sin), original(*heads, cos, sin), strict=True):
            torch.testing.assert_close(found, expected)


def test_half_of_the_angles_means_what_was_proved() -> None:
    q, k = torch.randn(1, 4, 3, 20), torch.randn(1, 3, 2, 20).transpose(1, 2)
    cos, sin = torch.randn(1, 3, 10), torch.randn(1, 3, 10)
    for original, halved in (
        (modeling_gpt_oss.apply_rotary_pos_emb, True),
        (modeling_phi3.apply_rotary_pos_emb, False),
    ):
        ours = fused_rotation(original, halved)
        for found, expected in zip(ours(q, k, cos, sin), original(q, k, cos, sin), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_the_same(family: str, tmp_path: Path) -> None:
    places, config = FAMILIES[family]
    folder = lively_model_folder(tmp_path, family, **{"num_hidden_layers": 2, **config})
    text = [3 + (i * i) % 250 for i in range(12)]
    expected = plain_logits(plain_model(folder), text)
    loaded = load_model(EngineConfig(path=str(folder), device="cpu", dtype="float32"), lambda stage, done: None)
    assert install_fused_ops(loaded) == places
    assert install_fused_ops(loaded) in (0, places - (places > 0))

    def attention(cache: KVCache) -> ReferenceAttention:
        return ReferenceAttention(cache)

    model = PagedModel(folder, attention, change=lambda module: install_fused_ops(replace(loaded, module=module)))
    (found,) = model.run([text])
    assert found
    assert all((row - expected[index]).abs().max() < 1e-4 for index, row in found.items())


def test_memory_that_runs_out_and_a_lost_device_are_not_the_kernels_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def __getitem__(self, grid: Any) -> Any:
            raise self.error

    def be_lost(_device: torch.device) -> None:
        raise EngineUnavailable("the device is lost")

    fused_ops = sys.modules["engine.fused.ops"]
    folder = lively_model_folder(tmp_path, "llama", num_hidden_layers=2)
    loaded = load_model(EngineConfig(path=str(folder), device="cpu", dtype="float32"), lambda stage, done: None)
    monkeypatch.setattr(fused_ops, "norm_kernel", Broken(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        install_fused_ops(loaded)
    monkeypatch.setattr(fused_ops, "norm_kernel", Broken(RuntimeError("CUDA error: an illegal memory access")))
    monkeypatch.setattr(cuda_health, "require_device", be_lost)
    with pytest.raises(EngineUnavailable):
        install_fused_ops(loaded)


def test_kernels_that_do_not_run_leave_the_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def __getitem__(self, grid: Any) -> Any:
            raise ValueError("no such architecture")

    monkeypatch.setattr(sys.modules["engine.fused.ops"], "norm_kernel", Broken())
    folder = lively_model_folder(tmp_path, "llama", num_hidden_layers=2)
    loaded = load_model(EngineConfig(path=str(folder), device="cpu", dtype="float32"), lambda stage, done: None)
    assert install_fused_ops(loaded) == 0
    assert "no such architecture" in caplog.text
    assert isinstance(loaded.module.model.norm, LlamaRMSNorm)


def test_a_model_of_the_same_code_on_a_cpu_keeps_its_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    original = modeling_llama.apply_rotary_pos_emb
    fused_ops = sys.modules["engine.fused.ops"]
    monkeypatch.setattr(fused_ops, "rotated", lambda *_: pytest.fail("our kernel, where it does not run"))
    monkeypatch.setattr(fused_ops, "_INTERPRETED", False)
    q, k = torch.randn(1, 4, 3, 20), torch.randn(1, 2, 3, 20)
    cos, sin = torch.randn(1, 3, 20), torch.randn(1, 3, 20)
    for found, expected in zip(
        fused_rotation(original, halved=False)(q, k, cos, sin), original(q, k, cos, sin), strict=True
    ):
        assert torch.equal(found, expected)

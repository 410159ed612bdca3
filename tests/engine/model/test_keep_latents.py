"""Which attentions keep latents, and which stay as they are; ``tests/reference`` shows that their logits are right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paged import PagedModel, lively_model_folder, plain_logits, plain_model
from support.tiny import LATENT
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.attention.base import AttentionOptions
from engine.attention.gather import ReferenceAttention
from engine.cache.layout import KVShape
from engine.model.latent import AbsorbedAttention
from engine.model.loader import LoadedModel, load_model
from engine.platforms.cpu import CpuPlatform
from engine.platforms.cuda import CudaPlatform
from engine.platforms.recipe import start_model

KEPT, EXPANDED = KVShape(1, 28, 20, values_in_keys=True), KVShape(4, 20, 16)
TEXT = [3 + (i * i) % 250 for i in range(21)]
Expand = Callable[[Any, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
EXPAND: Expand = DeepseekV3Attention.expand_kv


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model_folder(tmp_path_factory.mktemp("latent"), "deepseek_v3", **LATENT)


def silent(_stage: str, _done: float) -> None:
    pass


def load(folder: Path, dtype: str = "float32") -> LoadedModel:
    return load_model(EngineConfig(path=str(folder), device="cpu", dtype=dtype), silent)


def shapes(model: LoadedModel) -> list[KVShape]:
    return [layer.shape for layer in model.probe.layers]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_are_kept_in_every_type(folder: Path, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    """The proof is computed in float32, whatever the weights are."""
    with caplog.at_level("INFO"):
        assert shapes(load(folder, dtype)) == [KEPT] * 2
    assert "2 of 2 latent attentions keep latents" in caplog.messages


def _of_other_values(self: Any, latents: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = EXPAND(self, latents, rotated)
    return keys, values.tanh()


def _of_other_keys(self: Any, latents: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = EXPAND(self, latents, rotated)
    return keys.roll(1, dims=-1), values


def _not_linear_in_latents(self: Any, latents: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return EXPAND(self, latents * 1.001, rotated)


def _of_some_lengths(self: Any, latents: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if latents.shape[2] == 5:  # as many as the proof takes
        raise ValueError("five latents are too many")
    return EXPAND(self, latents, rotated)


@pytest.mark.parametrize(
    ("expand", "reason"),
    [
        (_of_other_values, "latents yield results that differ by "),
        (_of_other_keys, "latents yield results that differ by "),
        (_not_linear_in_latents, "latents yield results that differ by "),
        (_of_some_lengths, "its expand_kv does not take latents: five latents are too many"),
    ],
)
def test_what_is_not_proved_equal_stays_expanded_and_right(
    expand: Expand, reason: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(DeepseekV3Attention, "expand_kv", expand)
    paged = PagedModel(folder)
    assert paged.cache.keys[0].shape[2:] == (4, 20)
    assert not any(paged.cache.values_in_keys)
    assert "2 latent attentions keep expanded keys and values: layer model.layers.1.self_attn: " + reason in caplog.text
    expected = plain_logits(plain_model(folder), TEXT)
    for index, row in paged.run([TEXT], max_chunk=4)[0].items():
        assert (row - expected[index]).abs().max() < 1e-4


def test_keys_that_are_changed_before_the_attention_stay_expanded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The proof compares what the method returns; whether that reaches the attention as it is shows in the dry run."""
    forward = DeepseekV3Attention.forward

    def scaling_keys(self: Any, *args: Any, **keywords: Any) -> Any:
        expand = self.expand_kv
        self.expand_kv = lambda *given: tuple(part * 2 for part in expand(*given))
        try:
            return forward(self, *args, **keywords)
        finally:
            self.expand_kv = expand
            if getattr(expand, "__self__", None) is self:
                del self.expand_kv

    monkeypatch.setattr(DeepseekV3Attention, "forward", scaling_keys)
    model = load(folder)
    assert shapes(model) == [EXPANDED] * 2
    assert "its attention gets other keys or values than were made of its latents" in caplog.text
    assert all("expand_kv" not in vars(layer.module) for layer in model.probe.layers)


def test_latents_that_are_no_smaller_stay_expanded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = lively_model_folder(tmp_path, "deepseek_v3", **{**LATENT, "kv_lora_rank": 136})
    assert shapes(load(folder)) == [EXPANDED] * 2
    assert "latents are not smaller: 144 numbers for 144" in caplog.text


def test_absorbed_weights_are_not_copied() -> None:
    """What a layer holds beside its cache is what it held before."""
    weights = nn.Linear(20, 4 * 28, bias=False)
    absorbed = AbsorbedAttention(weights, heads=4, value_size=16)
    weights.weight.data.zero_()
    query = torch.randn(1, 4, 3, 20)
    assert not absorbed.enter(query)[..., :20].any()
    assert torch.equal(absorbed.enter(query)[..., 20:], query[..., 12:])
    keys = torch.randn(1, 1, 3, 28)
    with pytest.raises(ModelRefused, match="other keys or values"):
        absorbed(lambda *given: given[0], query, keys, keys[..., :20].clone(), None, AttentionOptions(1.0))


TINY = {"vocab_size": 64, "pad_token_id": 0, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4"])
def test_attention_that_chooses_its_keys_is_refused(model_type: str, tmp_path: Path) -> None:
    """Its indexer keeps keys of its own and hides some of the past: no latent cache serves it."""
    config = CONFIG_MAPPING[model_type](**TINY)
    with torch.device("meta"):
        assert any(hasattr(module, "expand_kv") for module in AutoModelForCausalLM.from_config(config).modules())
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelRefused, match=f"layer 0 of {model_type} is of the type 'indexed_attention'"):
        load(tmp_path)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_the_log_says_how_much_a_token_takes(platform: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = EngineConfig(path=str(folder), device="cpu", max_context=64, max_running=2)
    chosen = CpuPlatform() if platform == "cpu" else CudaPlatform(torch.device("cpu"), attention=ReferenceAttention)
    with caplog.at_level("INFO"):
        start_model(lambda: load(folder), config, (), silent, chosen)
    (line,) = (message for message in caplog.messages if message.startswith("KV cache: "))
    assert f" tokens of float32 in 0 MiB, {2 * 28 * 4} bytes a token, 2.0 sequences" in line

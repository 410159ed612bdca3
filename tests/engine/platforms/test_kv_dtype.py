"""Keys and values in fp8 through the whole engine: who refuses it, and what models compute with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paged import PagedModel, lively_model_folder, plain_logits, plain_model
from support.tiny import LATENT
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.attention.gather import ReferenceAttention
from engine.build import load_tokenizer
from engine.cache.fp8 import dequantise, quantise
from engine.core.core import Core
from engine.model.loader import LoadedModel, load_model
from engine.platforms.cuda import CudaPlatform
from engine.platforms.recipe import start_model
from engine.sampling import BatchSampler

TEXTS = [[3 + (7 * i + 11 * n) % 250 for i in range(length)] for n, length in enumerate((37, 5, 21))]
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (modeling_llama, {}),
    "mistral": (modeling_mistral, {"sliding_window": 8}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mixture_of_chunks_computes_the_model_with_rounded_keys_and_values(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where no sum in another order moves a key over the border between two fp8 numbers."""
    modeling, config = FAMILIES[family]
    folder = lively_model_folder(tmp_path, family, **config)
    paged = PagedModel(folder, change=lambda module: module.double(), fp8=True)
    plain = plain_model(folder).double()
    unrounded = [plain_logits(plain, text) for text in TEXTS]
    attend = modeling.eager_attention_forward

    def rounded(module: Any, query: Any, key: Any, value: Any, *given: Any, **more: Any) -> Any:
        key, value = (dequantise(*quantise(numbers), numbers.dtype) for numbers in (key, value))
        return attend(module, query, key, value, *given, **more)

    monkeypatch.setattr(modeling, "eager_attention_forward", rounded)
    for _ in range(2):
        for text, found, exact in zip(TEXTS, paged.run(TEXTS), unrounded, strict=True):
            assert found
            expected = plain_logits(plain, text)
            for place, logits in found.items():
                torch.testing.assert_close(logits, expected[place].float(), rtol=1e-4, atol=1e-4)
            assert max((logits - exact[place]).abs().max() for place, logits in found.items()) > 0.01


def test_latents_are_rounded_together_with_their_rotated_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lively_model_folder(tmp_path, "deepseek_v3", **LATENT)
    paged = PagedModel(folder, change=lambda module: module.double(), fp8=True)
    plain = plain_model(folder).double()
    unrounded = [plain_logits(plain, text) for text in TEXTS]
    expand = DeepseekV3Attention.expand_kv

    def rounded(module: Any, latents: torch.Tensor, rotated: torch.Tensor) -> Any:
        together = torch.cat([latents, rotated], dim=-1)
        kept = dequantise(*quantise(together), together.dtype)
        return expand(module, *kept.split([latents.shape[-1], rotated.shape[-1]], dim=-1))

    monkeypatch.setattr(DeepseekV3Attention, "expand_kv", rounded)
    for _ in range(2):
        for text, found, exact in zip(TEXTS, paged.run(TEXTS), unrounded, strict=True):
            assert found
            expected = plain_logits(plain, text)
            for place, logits in found.items():
                torch.testing.assert_close(logits, expected[place].float(), rtol=1e-4, atol=1e-4)
            assert max((logits - exact[place]).abs().max() for place, logits in found.items()) > 0.01


def silent(_stage: str, _done: float) -> None:
    pass


def loaded(folder: Path) -> LoadedModel:
    return load_model(EngineConfig(path=str(folder), device="cpu", max_context=128), silent)


def answers(folder: Path, prompts: list[tuple[int, ...]], **config: Any) -> tuple[list[tuple[int, ...]], int]:
    """The greedy tokens of each prompt, and how many prompt tokens came from the prefix cache.

    The requests arrive a step apart.
    """
    given = EngineConfig(path=str(folder), device="cpu", kv_dtype="fp8", kv_memory=1e6, **config)
    platform = CudaPlatform(torch.device("cpu"), attention=ReferenceAttention)
    runner = start_model(lambda: loaded(folder), given, (), silent, platform)
    core = Core(runner, BatchSampler(), load_tokenizer(folder), given)
    told: dict[str, tuple[int, ...]] = {}
    cached = 0
    for number, prompt in enumerate(prompts):
        core.submit(Request(f"r{number}", prompt, SamplingParams(12, 0.0)))
        for _ in range(1 if number < len(prompts) - 1 else 300):
            for events in core.step():
                for delta in events.deltas:
                    told[events.request_id] = told.get(events.request_id, ()) + delta.token_ids
                if events.done is not None:
                    cached += events.done.cached_tokens
    assert not core.has_work
    core.check()
    return [told[f"r{number}"] for number in range(len(prompts))], cached


def test_answers_are_the_same_alone_together_and_from_the_prefix_cache(tmp_path: Path) -> None:
    folder = lively_model_folder(tmp_path, "llama", num_hidden_layers=2)
    shared = tuple(5 + i * i % 200 for i in range(40))
    prompts = [(*shared, n, 7, n) for n in (9, 30, 9)]
    alone = [answers(folder, [prompt], cuda_graphs=False)[0][0] for prompt in prompts]
    together, cached = answers(folder, prompts, cuda_graphs=False, step_target_ms=0.01)
    assert together == alone
    assert cached > 0


def test_the_log_says_the_type_and_the_cache_holds_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = lively_model_folder(tmp_path, "llama", num_hidden_layers=1)
    config = EngineConfig(path=str(folder), device="cpu", kv_memory=2e5, max_running=64, cuda_graphs=False)
    platform = CudaPlatform(torch.device("cpu"), attention=ReferenceAttention)
    with caplog.at_level("INFO"):
        blocks = [
            start_model(lambda: loaded(folder), replace(config, kv_dtype=kind), (), silent, platform)
            .info.groups[0]
            .num_blocks
            for kind in ("auto", "fp8")
        ]
    assert blocks[1] > 3.5 * blocks[0]  # beside float32
    assert "tokens of float32 in" in caplog.text
    assert "tokens of fp8 in" in caplog.text


def never_loaded() -> LoadedModel:
    raise AssertionError("refused before anything is loaded")


def test_a_cpu_refuses_it() -> None:
    config = EngineConfig(path="folder", device="cpu", kv_dtype="fp8")
    with pytest.raises(ModelRefused, match=r"^kv_dtype is 'fp8', but on a CPU .*; leave kv_dtype out, or set"):
        start_model(never_loaded, config, (), silent)


def test_a_gpu_without_e4m3_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(path="folder", kv_dtype="fp8")
    platform = CudaPlatform(torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 6))
    expected = r"^kv_dtype is 'fp8', which takes .* 8\.9 or higher, but cuda:1 has 8\.6; leave kv_dtype out$"
    with pytest.raises(ModelRefused, match=expected):
        start_model(never_loaded, config, (), silent, platform)
    platform.check(replace(config, kv_dtype="auto"))
    for enough in ((8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, found=enough: found)
        platform.check(config)

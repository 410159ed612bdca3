"""Composite checkpoints, loaded with their towers: text through the paged path equals a plain float32 forward."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.digests import make_request, run_to_end
from support.fates import compare, lively_class_folder, plain_class, tolerance_of
from support.paged import PagedModel, apart, plain_logits, texts
from support.tiny import save_tiny_tokenizer

from engine.api.engine import EngineConfig
from engine.attention.base import AttentionOptions
from engine.attention.gather import ReferenceAttention
from engine.build import build_core
from engine.model.attention_hook import PAGED
from engine.model.loader import load_model
from engine.scheduling.flat_batch import flatten
from engine.scheduling.sequence import ScheduledChunk

pytestmark = pytest.mark.reference

# What the checkpoints of Gemma 4 say beside the defaults of its class, in their own sizes.
SHARED_KV = {"num_hidden_layers": 35, "num_kv_shared_layers": 20, "use_double_wide_mlp": True}
LARGE = {
    "hidden_size_per_layer_input": 0,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "use_bidirectional_attention": "vision",
}
EXPERTS = {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
COMPOSITES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("Gemma3ForConditionalGeneration", {}),
    "gemma4": ("Gemma4ForConditionalGeneration", {}),
    "gemma4-shared-kv": ("Gemma4ForConditionalGeneration", {"text_config": SHARED_KV}),
    "gemma4-large": ("Gemma4ForConditionalGeneration", {"text_config": LARGE, "audio_config": None}),
    "gemma4-experts": ("Gemma4ForConditionalGeneration", {"text_config": {**LARGE, **EXPERTS}, "audio_config": None}),
    "gemma4-unified": (
        "Gemma4UnifiedForConditionalGeneration",
        {"text_config": {"use_bidirectional_attention": "vision"}},
    ),
    "mistral3": ("Mistral3ForConditionalGeneration", {}),
    # Mistral Small 4: latent attention and experts under the same class.
    "mistral3-latent": ("Mistral3ForConditionalGeneration", {"text_config": {"model_type": "mistral4"}}),
    "muse-glimmer": ("MuseGlimmerForConditionalGeneration", {}),
    # Its text has no configuration of its own.
    "phi4-multimodal": ("Phi4MultimodalForCausalLM", {}),
    "qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", {}),
    "qwen3-vl": ("Qwen3VLForConditionalGeneration", {}),
    "qwen3-vl-moe": ("Qwen3VLMoeForConditionalGeneration", {}),
    "qwen3.5": ("Qwen3_5ForConditionalGeneration", {}),
    "qwen3.5-moe": ("Qwen3_5MoeForConditionalGeneration", {}),
}
MROPE = ("qwen2.5-vl", "qwen3-vl")


@dataclass(frozen=True)
class _Small:
    folder: Path
    plain: Any
    tolerance: float


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes each composite once."""

    @lru_cache
    def make(composite: str) -> _Small:
        folder = tmp_path_factory.mktemp("composites") / composite
        name, published = COMPOSITES[composite]
        model_class = lively_class_folder(folder, name, published)
        plain = plain_class(folder, model_class)
        return _Small(folder, plain, tolerance_of(plain.config))

    return make


@pytest.mark.parametrize("composite", COMPOSITES)
def test_every_mixture_of_chunks_equals_a_plain_forward(composite: str, small: Any) -> None:
    """Alone, side by side, and after a prefix that is cached."""
    model = small(composite)
    worst, _ = compare(PagedModel(model.folder), model.plain)
    assert worst < model.tolerance


@pytest.mark.parametrize("composite", ["gemma4-shared-kv", "mistral3", "qwen2.5-vl"])
def test_the_whole_engine_writes_what_greedy_decoding_writes(composite: str, small: Any) -> None:
    model = small(composite)
    save_tiny_tokenizer(model.folder)
    core = build_core(EngineConfig(path=str(model.folder), device="cpu", kv_memory=2e6, threads=1), lambda *_: None)
    requests = [make_request(str(n), text, temperature=0.0, stop_ids=()) for n, text in enumerate(texts())]
    told = run_to_end(core, *requests)
    for number, text in enumerate(texts()):
        written = list(text)
        for _ in range(requests[number].sampling.max_tokens):
            written.append(int(plain_logits(model.plain, written)[-1].argmax()))
        assert told[str(number)].tokens[0] == written[len(text) :]


@pytest.mark.parametrize("composite", ["gemma3", "gemma4", "mistral3", "phi4-multimodal", "qwen3-vl"])
def test_towers_are_loaded_and_keep_their_own_attention(composite: str, small: Any) -> None:
    model = small(composite)
    loaded = load_model(EngineConfig(path=str(model.folder), device="cpu", dtype="float32"), lambda stage, done: None)
    assert type(loaded.module) is type(model.plain)
    assert {name for name, _ in loaded.module.named_parameters()} == {
        name for name, _ in model.plain.named_parameters()
    }
    assert loaded.module.config.get_text_config()._attn_implementation == PAGED
    assert loaded.module.config.vision_config._attn_implementation == "eager"
    assert all("vision" not in layer.name and "visual" not in layer.name for layer in loaded.probe.layers)


def test_latents_of_a_composite_are_kept(small: Any) -> None:
    text = small("mistral3-latent").plain.config.get_text_config()
    cache = PagedModel(small("mistral3-latent").folder).cache
    assert cache.values_in_keys == [True] * text.num_hidden_layers
    assert {keys.shape[2:] for keys in cache.keys} == {(1, text.kv_lora_rank + text.qk_rope_head_dim)}


# --- Positions of several axes -------------------------------------------------------------------


@pytest.mark.parametrize("composite", MROPE)
def test_text_counts_the_same_on_all_axes(composite: str, small: Any) -> None:
    model = small(composite)
    text = texts()[0]
    expected = plain_logits(model.plain, text)[-1]
    paged = PagedModel(model.folder)

    def last_logits(*axes: list[int]) -> torch.Tensor:
        sequence = paged.sequence(text, paged.take_blocks(len(text)))
        batch = flatten(
            [ScheduledChunk(sequence, 0, len(text))],
            paged.block_size,
            paged.windows,
            position_axes=tuple(array("i", axis) for axis in axes) or None,
        )
        return paged.runner.compute(batch)[0]

    count = list(range(len(text)))
    assert (last_logits() - expected).abs().max() < model.tolerance
    assert (last_logits(count, count, count) - expected).abs().max() < model.tolerance
    # The comparison sees axes that are not equal.
    assert (last_logits(count, [0] * len(text), count) - expected).abs().max() > 100 * model.tolerance


@pytest.mark.parametrize("composite", MROPE)
def test_what_a_model_keeps_of_an_image_moves_no_text(composite: str, small: Any) -> None:
    """Generation by transformers leaves an offset of positions on the module."""
    model = small(composite)
    paged = PagedModel(model.folder, change=_leave_an_offset)
    for found, text in zip(paged.run(texts()), texts(), strict=True):
        assert apart(found, plain_logits(model.plain, text)) < model.tolerance


def _leave_an_offset(module: Any) -> None:
    assert hasattr(module.model, "rope_deltas")
    module.model.rope_deltas = torch.tensor([[7]])


# --- What must be seen ---------------------------------------------------------------------------


class _NoWindow(ReferenceAttention):
    def attend(self, layer: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        return super().attend(layer, query, options._replace(sliding_window=None))


class _DefaultScale(ReferenceAttention):
    def attend(self, layer: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        return super().attend(layer, query, options._replace(scaling=query.shape[-1] ** -0.5))


class _SharedPlaceKeepsNothing(ReferenceAttention):
    """The last place is that of layers which share their keys and values."""

    def write_kv(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        if layer < len(self._cache.keys) - 1:
            super().write_kv(layer, key, value)


class _ValuesAreKeys(ReferenceAttention):
    def write_kv(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        super().write_kv(layer, key, key)


@pytest.mark.parametrize(
    ("composite", "broken"),
    [
        ("gemma3", _NoWindow),
        ("gemma4", _NoWindow),
        ("gemma4", _DefaultScale),
        ("gemma4-shared-kv", _SharedPlaceKeepsNothing),
        ("gemma4-large", _ValuesAreKeys),
        ("gemma4-experts", _NoWindow),
        ("gemma4-unified", _NoWindow),
        ("muse-glimmer", _NoWindow),
    ],
)
def test_the_comparison_sees_what_a_backend_loses(composite: str, broken: type[ReferenceAttention], small: Any) -> None:
    model = small(composite)
    found = PagedModel(model.folder, broken).run(texts())
    assert apart(found[0], plain_logits(model.plain, texts()[0])) > 100 * model.tolerance


@pytest.mark.parametrize(
    ("composite", "part"),
    [("gemma4", "per_layer_model_projection"), ("gemma4-experts", "experts"), ("gemma4-unified", "q_norm")],
)
def test_the_comparison_sees_a_part_that_is_left_out(composite: str, part: str, small: Any) -> None:
    model = small(composite)

    def empty(module: Any) -> None:
        changed = [weight for name, weight in module.named_parameters() if f".{part}." in name]
        assert changed, f"no part is called {part}"
        with torch.no_grad():
            for weight in changed:
                weight.zero_()

    found = PagedModel(model.folder, change=empty).run(texts())
    assert apart(found[0], plain_logits(model.plain, texts()[0])) > 100 * model.tolerance

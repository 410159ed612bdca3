"""Many families at tiny sizes: logits through the paged path equal a plain float32 forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.paged import (
    TOLERANCE,
    PagedModel,
    apart,
    apart_after_shared_pages,
    apart_in_chunks,
    lively_model_folder,
    plain_logits,
    plain_model,
    texts,
)

from engine.attention.base import AttentionOptions
from engine.attention.gather import ReferenceAttention
from engine.model import loader
from engine.scheduling.sequence import Sequence

pytestmark = pytest.mark.reference

HYBRID = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
SHARED_KV = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8}
# Scales that are not 1/sqrt(head size), caps that bite: what a backend could lose without a tiny model noticing.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {**HYBRID, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**HYBRID, "query_pre_attn_scalar": 5},
    "gemma3n_text": {
        **HYBRID,
        **SHARED_KV,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {**HYBRID, **SHARED_KV, "global_head_dim": 32},
    "phi3": {},
    "gpt_oss": {**HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.4},
    "cohere2": HYBRID,
    "gpt2": {},
    "smollm3": {},
    "starcoder2": {"sliding_window": 8},
    "llama4_text": {
        "head_dim": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 64,
        "attention_chunk_size": 8,
        "layer_types": ["chunked_attention", "chunked_attention", "full_attention", "chunked_attention"],
        "no_rope_layers": [1, 1, 0, 1],
        "floor_scale": 4,
        "attn_scale": 0.7,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def _folder(folders: Path, family: str) -> Path:
    folder = folders / family
    return folder if folder.exists() else lively_model_folder(folder, family, **FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mixture_of_chunks_equals_a_plain_forward(family: str, folders: Path) -> None:
    folder = _folder(folders, family)
    assert apart_in_chunks(PagedModel(folder), plain_model(folder), texts(), (2, 4, 9, 64)) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_pages_equal_a_plain_forward(family: str, folders: Path) -> None:
    folder = _folder(folders, family)
    assert apart_after_shared_pages(PagedModel(folder), plain_model(folder)) < TOLERANCE


class _NoSoftcap(ReferenceAttention):
    def attend(self, layer: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        return super().attend(layer, query, options._replace(softcap=None))


class _DefaultScale(ReferenceAttention):
    def attend(self, layer: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        return super().attend(layer, query, options._replace(scaling=query.shape[-1] ** -0.5))


class _NoWindow(ReferenceAttention):
    def attend(self, layer: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        return super().attend(layer, query, options._replace(sliding_window=None))


class _NoChunks(ReferenceAttention):
    def attend(self, layer: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        return super().attend(layer, query, options._replace(chunk_size=None))


class _NoSinks(ReferenceAttention):
    def attend(self, layer: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        return super().attend(layer, query, options._replace(sinks=None))


@pytest.mark.parametrize(
    ("family", "broken"),
    [
        ("gemma2", _NoSoftcap),
        ("gemma2", _DefaultScale),
        ("gemma2", _NoWindow),
        ("gemma3_text", _DefaultScale),
        ("gemma3_text", _NoWindow),
        ("gemma4_text", _DefaultScale),
        ("granite", _DefaultScale),
        ("mistral", _NoWindow),
        ("starcoder2", _NoWindow),
        ("gpt_oss", _NoSinks),
        ("gpt_oss", _NoWindow),
        ("llama4_text", _NoChunks),
    ],
)
def test_the_comparison_sees_what_a_backend_loses(family: str, broken: type[ReferenceAttention], folders: Path) -> None:
    folder = _folder(folders, family)
    found = PagedModel(folder, broken).run(texts())
    assert apart(found[0], plain_logits(plain_model(folder), texts()[0])) > 100 * TOLERANCE


class _Hasty(PagedModel):
    """Loses a block that the window still sees."""

    def spoil_what_is_passed(self, sequence: Sequence, done: int) -> None:
        super().spoil_what_is_passed(sequence, done + self.block_size)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss", "llama4_text"])
def test_the_comparison_sees_a_block_that_is_given_back_too_early(family: str, folders: Path) -> None:
    folder = _folder(folders, family)
    found = _Hasty(folder).run(texts())
    assert apart(found[0], plain_logits(plain_model(folder), texts()[0])) > 100 * TOLERANCE


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_layers_that_share_keys_and_values_keep_one_copy(family: str, folders: Path) -> None:
    folder = _folder(folders, family)
    paged = PagedModel(folder)
    assert len(paged.cache.keys) == 2


def test_the_comparison_sees_queries_that_are_scaled_by_their_rows(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "scale_queries", lambda module: None)
    folder = _folder(folders, "llama4_text")
    found = PagedModel(folder).run(texts())
    assert apart(found[0], plain_logits(plain_model(folder), texts()[0])) > 100 * TOLERANCE

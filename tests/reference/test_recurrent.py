"""Models with recurrent layers at tiny sizes: logits through slots of states equal a plain float32 forward."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from support.digests import Told, run_to_end
from support.paged import (
    MOE_TOLERANCE,
    TOLERANCE,
    PagedModel,
    apart,
    apart_in_chunks,
    lively_model_folder,
    plain_logits,
    plain_model,
    texts,
)

from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.build import build_core
from engine.cache import layout
from engine.cache.layout import GroupDemand, block_bytes, plan_caches
from engine.cache.state_tensors import StateCache, slot_bytes
from engine.model.loader import load_model
from engine.native.library import load_library
from engine.native.states import NativeStates
from engine.recurrent import proof
from engine.recurrent.recurrences import Arguments, Operator, Recurrence
from engine.recurrent.states import RecurrentStates
from engine.scheduling.flat_batch import FlatBatch

pytestmark = pytest.mark.reference

LENGTHS = (37, 5, 19, 70)
DELTA = {
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**DELTA, **EXPERTS},
    "qwen3_next": {**DELTA, **EXPERTS},
    "olmo_hybrid": DELTA,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"] * 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
    },
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["mamba", "mamba", "mamba", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def _folder(folders: Path, family: str) -> Path:
    folder = folders / family
    return folder if folder.exists() else lively_model_folder(folder, family, 3.0, **FAMILIES[family])


def _tolerance(family: str) -> float:
    return MOE_TOLERANCE if "moe" in family or family in ("qwen3_next", "nemotron_h") else TOLERANCE


@pytest.fixture(scope="session")
def in_c(tmp_path_factory: pytest.TempPathFactory) -> Callable[[StateCache], RecurrentStates]:
    return partial(NativeStates, code=load_library(tmp_path_factory.mktemp("native")), threads=2)


@pytest.mark.parametrize("code", ["torch", "C"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mixture_of_chunks_equals_a_plain_forward(
    family: str, code: str, in_c: Callable[[StateCache], RecurrentStates], folders: Path
) -> None:
    folder = _folder(folders, family)
    paged = PagedModel(folder, states=in_c if code == "C" else RecurrentStates)
    assert apart_in_chunks(paged, plain_model(folder), texts(*LENGTHS), (2, 9, 64, 100)) < _tolerance(family)


class _ForgetsConvolutions(RecurrentStates):
    def convolve(self, index: int, *given: Any) -> torch.Tensor:
        self._cache.states[index].zero_()
        return super().convolve(index, *given)


class _ForgetsRecurrences(RecurrentStates):
    def recur(self, index: int, recurrence: Recurrence, operator: Operator, arguments: Arguments) -> torch.Tensor:
        self._cache.states[index].zero_()
        return super().recur(index, recurrence, operator, arguments)


class _MixesSlots(RecurrentStates):
    def prepare(self, batch: FlatBatch) -> None:
        super().prepare(replace(batch, state_slots=array("i", [slot ^ 1 for slot in batch.state_slots])))


class _NeverBegins(RecurrentStates):
    def prepare(self, batch: FlatBatch) -> None:
        super().prepare(replace(batch, state_loads=()))


@pytest.mark.parametrize(
    ("family", "broken"),
    [
        ("qwen3_5_text", _ForgetsConvolutions),
        ("qwen3_5_text", _ForgetsRecurrences),
        ("qwen3_5_text", _MixesSlots),
        ("qwen3_5_text", _NeverBegins),
        ("lfm2", _ForgetsConvolutions),
        ("lfm2", _NeverBegins),
        ("granitemoehybrid", _ForgetsRecurrences),
        ("falcon_h1", _MixesSlots),
        ("nemotron_h", _ForgetsRecurrences),
    ],
)
def test_the_comparison_sees_what_is_lost(family: str, broken: type[RecurrentStates], folders: Path) -> None:
    folder = _folder(folders, family)
    compared = texts(*LENGTHS)
    found = PagedModel(folder, states=broken).run(compared)
    assert apart(found[3], plain_logits(plain_model(folder), compared[3])) > 5 * _tolerance(family)


def test_a_mixer_that_computes_something_else_is_refused(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _folder(folders, "qwen3_5_text")
    monkeypatch.setattr(proof, "RecurrentStates", _ForgetsConvolutions)
    with pytest.raises(ModelRefused, match=r"layer model\.layers\.2\.linear_attn \(Qwen3_5GatedDeltaNet\).*differs"):
        PagedModel(folder)


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "granitemoehybrid", "falcon_h1", "nemotron_h"])
def test_the_core_answers_with_the_numbers_of_a_plain_forward(
    family: str, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten requests that share beginnings, some cancelled, on a cache that is too small for the six that run; then all
    of them again, from snapshots."""
    monkeypatch.setattr(layout, "SNAPSHOTS_SHARE", 0.4)
    folder = _folder(folders, family)
    plain = plain_model(folder)
    long, short, middle, longest = texts(*LENGTHS)
    # Six short ones start at once and outgrow their blocks together.
    beginnings = [short] * 6 + [long, longest, middle, longest]
    requests = [
        Request(
            f"r{number}",
            (*beginning, *range(40, 44 + number % 6)),
            SamplingParams(max_tokens=28, temperature=0.0, logprobs=0, stop_ids=()),
            candidates=1 + number // 9,
        )
        for number, beginning in enumerate(beginnings)
    ]
    config = EngineConfig(
        str(folder),
        device="cpu",
        dtype="float32",
        block_size=4,
        state_stride=8,
        max_running=6,
        kv_memory=_memory(folder),
    )
    with closing(build_core(config, lambda stage, done: None)) as core:
        first = run_to_end(core, *requests, cancelled=["r6", "r8", "r9"])
        assert core.stats().preemptions
        again = run_to_end(core, *requests)
    for request in requests:
        assert again[request.id].done is not None
        assert again[request.id].done.error is None
        _require_plain(request, again[request.id], plain, 10 * _tolerance(family))
        if request.id in first and not first[request.id].done.error:
            _require_plain(request, first[request.id], plain, 10 * _tolerance(family))
    assert any(told.done.cached_tokens for told in again.values())


def _require_plain(request: Request, told: Told, plain: Any, tolerance: float) -> None:
    """Every token is the likeliest one, with its log-probability, by a plain forward."""
    assert len(told.tokens) == request.candidates
    for candidate, tokens in told.tokens.items():
        logprobs = plain_logits(plain, [*request.prompt, *tokens]).log_softmax(-1)
        for place, (token, found) in enumerate(zip(tokens, told.logprobs[candidate], strict=True)):
            row = logprobs[len(request.prompt) + place - 1]
            assert abs(found.chosen - float(row[token])) < tolerance
            assert float(row.max() - row[token]) < tolerance


def _memory(folder: Path) -> float:
    """Bytes for a cache of six slots and some snapshots, and of blocks for about half of what would run."""
    probe = load_model(EngineConfig(str(folder), device="cpu", dtype="float32"), lambda stage, done: None).probe
    per_block = block_bytes([layer.shape for layer in probe.layers], 4, torch.float32)
    per_slot = slot_bytes(probe.states)
    for budget in count(15 * per_slot + per_block, per_block):
        plan = plan_caches(budget, [GroupDemand(per_block)], 4, 512, 6, bytes_per_slot=per_slot)
        if plan.max_running == 6 and plan.groups[0].num_blocks >= 40:
            return float(budget)
    raise AssertionError("no memory is enough")

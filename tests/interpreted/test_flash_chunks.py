"""flash-linear-attention, interpreted, behind the operators that our states call it for: its numbers are torch's.

In float32 only: the interpreter takes bfloat16 for integers in products. Installed by scripts/sdk-envs, and seen by
this process alone.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from inspect import signature, unwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paged import lively_model_folder, make_sequence
from support.sdks import environment

from engine.api.engine import EngineConfig
from engine.cache.state_tensors import StateCache, StateShape
from engine.closeness import difference
from engine.model.loader import load_model
from engine.platforms.cuda import advancing
from engine.recurrent.flash_chunks import FlashChunks
from engine.recurrent.recurrences import DELTA, MAMBA2
from engine.recurrent.states import RecurrentStates
from engine.recurrent.triton_states import TritonStates
from engine.scheduling.flat_batch import flatten
from engine.scheduling.sequence import ScheduledChunk

CPU = torch.device("cpu")


class Counter(int):
    """A loop's counter: what is compiled knows it as a tensor."""

    def to(self, *_: Any) -> Counter:
        return self


@pytest.fixture(scope="module")
def flash() -> Iterator[FlashChunks]:
    """The library, without measuring which of its tilings is fastest."""
    folder = Path(environment("fla-core-0.6.0", "lib"))
    sys.path.append(str(next(folder.glob("python3.*/site-packages"))))
    with pytest.MonkeyPatch.context() as patch:
        from triton.runtime.autotuner import Autotuner

        patch.setattr(Autotuner, "_bench", lambda *_, **__: [0.0] * 3)
        from fla.ops.common import chunk_delta_h, chunk_h

        for looping in (chunk_delta_h, chunk_h):
            patch.setattr(looping, "range", lambda *bounds: map(Counter, builtins.range(*bounds)), raising=False)
        yield FlashChunks()
    sys.path.pop()


# A decode between chunks, and two chunks side by side.
LENGTHS = (5, 1, 70, 33, 1)
SLOTS = (4, 0, 6, 2, 5)


def compared(flash: FlashChunks, recurrence: Any, operator: Any, arguments: Any, shape: tuple[int, ...]) -> float:
    """The largest difference in outputs and states of a step that continues what lies in the slots."""
    sequences = [make_sequence([0] * (3 + count), []) for count in LENGTHS]
    for sequence, slot in zip(sequences, SLOTS, strict=True):
        sequence.state_slot = slot
    chunks = [ScheduledChunk(sequence, 3, count) for sequence, count in zip(sequences, LENGTHS, strict=True)]
    found = []
    for flashing in (False, True):
        cache = StateCache([StateShape(shape, torch.float32)], 7, CPU)
        cache.states[0].copy_(torch.randn(7, *shape, generator=torch.Generator().manual_seed(1)))
        states = TritonStates(cache, flash) if flashing else RecurrentStates(cache)
        states.prepare(flatten(chunks, 1, windows=(), states=True))
        with torch.inference_mode():
            found.append((states.recur(0, recurrence, operator, arguments), cache.states[0]))
    return max(difference(ours, expected) for expected, ours in zip(*found, strict=True))


def test_chunks_of_a_gated_delta_rule(flash: FlashChunks) -> None:
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    arguments = {
        "query": torch.randn(1, tokens, 2, 16),
        "key": torch.randn(1, tokens, 2, 16),
        "value": torch.randn(1, tokens, 4, 32),
        "beta": torch.rand(1, tokens, 4),
        "g": -torch.rand(1, tokens, 4) / 4,
        "use_qk_l2norm_in_kernel": True,
    }
    operator = unwrap(torch_chunk_gated_delta_rule)
    assert compared(flash, DELTA, operator, arguments, (4, 16, 32)) < 1e-5
    # And the comparison sees what a wrong decay does.
    doubled = FlashChunks()
    original = doubled._delta_rule
    doubled._delta_rule = lambda *given, **more: original(*given, **{**more, "g": 2 * more["g"]})
    assert compared(doubled, DELTA, operator, arguments, (4, 16, 32)) > 1e-2


def test_chunks_of_a_state_space_model(flash: FlashChunks) -> None:
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import mamba2_chunk_scan

    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    arguments = {
        "hidden_states": torch.randn(1, tokens, 4, 16),
        "dt": torch.randn(1, tokens, 4),
        "A": -torch.rand(4),
        "B": torch.randn(1, tokens, 2, 32),
        "C": torch.randn(1, tokens, 2, 32),
        "D": torch.randn(4),
        "dt_bias": torch.randn(4),
        "dt_softplus": True,
        "chunk_size": 64,
    }
    assert compared(flash, MAMBA2, unwrap(mamba2_chunk_scan), arguments, (4, 16, 32)) < 1e-5


def test_it_keeps_what_we_call_it_with(flash: FlashChunks) -> None:
    for operator in (flash._delta_rule, flash._linear_attention):
        taken = signature(operator).parameters
        assert {"g", "initial_state", "output_final_state", "cu_seqlens", "cu_seqlens_cpu"} <= taken.keys()


@pytest.mark.parametrize("family", ["qwen3_5_text", "granitemoehybrid"])
def test_a_model_is_proved_against_torch_though_transformers_takes_the_library(
    family: str, flash: FlashChunks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    sizes: dict[str, dict[str, Any]] = {
        "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                         "linear_num_value_heads": 8, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
        "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16,
                             "mamba_d_state": 16, "mamba_n_groups": 2, "num_local_experts": 0,
                             "shared_intermediate_size": 64},
    }  # fmt: skip
    folder = lively_model_folder(tmp_path, family, 3.0, num_hidden_layers=2, **sizes[family])
    model = load_model(EngineConfig(path=str(folder), device="cpu", dtype="float32"), lambda _stage, _done: None)
    states = advancing(model, StateCache(model.probe.states, 2, CPU))
    assert isinstance(states, TritonStates)
    assert "Recurrent layers are computed by our kernels and flash-linear-attention" in caplog.messages

"""The kernels of recurrent layers against torch, over steps of decodes and chunks in slots of all kinds."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from inspect import unwrap
from typing import Any

import pytest
import torch
from support.paged import make_sequence
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import mamba2_chunk_scan
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from engine.cache.state_tensors import StateCache, StateShape
from engine.closeness import REORDERED_SUMS, difference
from engine.recurrent.recurrences import DELTA, MAMBA2, Recurrence
from engine.recurrent.states import RecurrentStates
from engine.recurrent.triton_states import TritonStates
from engine.scheduling.flat_batch import FlatBatch, StepShape, flatten
from engine.scheduling.sequence import ScheduledChunk

CPU = torch.device("cpu")
NUM_SLOTS = 7
# Tokens of the chunks of each step, in slots that follow no order; one of a convolution is shorter than its past.
STEPS = {"decodes": (1, 1, 1), "one decode": (1,), "chunks": (5, 1, 2, 40, 1)}
SLOTS = (4, 0, 6, 2, 5)
TYPES = (torch.float32, torch.bfloat16)


def batch_of(lengths: tuple[int, ...]) -> FlatBatch:
    """A step that continues the states that lie in the slots."""
    sequences = [make_sequence([0] * (3 + count), []) for count in lengths]
    for sequence, slot in zip(sequences, SLOTS, strict=False):
        sequence.state_slot = slot
    chunks = [ScheduledChunk(sequence, 3, count) for sequence, count in zip(sequences, lengths, strict=True)]
    return flatten(chunks, 1, windows=(), states=True)


def caches(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[StateCache]:
    """Two alike. Beside the state another one, so that slots do not lie one after another."""
    made = []
    for _ in range(2):
        cache = StateCache([StateShape((7,), torch.float32), StateShape(shape, dtype)], NUM_SLOTS, CPU)
        for state in cache.states:
            state.copy_(torch.randn(state.shape, generator=torch.Generator().manual_seed(1)))
        made.append(cache)
    return made


def require_equal(shape: tuple[int, ...], kept: torch.dtype, tolerance: float, step: str, compute: Compute) -> None:
    """``compute`` by torch and by Triton: its output, and every slot afterwards."""
    results = []
    for cache, make in zip(caches(shape, kept), (RecurrentStates, TritonStates), strict=True):
        states = make(cache)
        states.prepare(batch_of(STEPS[step]))
        with torch.inference_mode():
            results.append((compute(states), *cache.states))
    for expected, found in zip(*results, strict=True):
        assert difference(found, expected) < tolerance
    untouched = [slot for slot in range(NUM_SLOTS) if slot not in SLOTS[: len(STEPS[step])]]
    assert torch.equal(results[1][2][untouched], caches(shape, kept)[0].states[1][untouched])
    assert not torch.equal(results[1][2], caches(shape, kept)[0].states[1])


Compute = Callable[[RecurrentStates], torch.Tensor]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("channels", "taps", "biased", "activation"),
    [(300, 4, False, "silu"), (24, 3, False, None), (64, 4, True, "silu"), (16, 2, True, "gelu")],
)
def test_convolutions(
    channels: int, taps: int, biased: bool, activation: str | None, step: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    # As a mixer has it: a part of a joined product, seen from its channels.
    x = torch.randn(1, sum(STEPS[step]), channels + 40).to(dtype)[..., 16 : 16 + channels].transpose(1, 2)
    weight, bias = torch.randn(channels, taps).to(dtype), torch.randn(channels).to(dtype) if biased else None

    def compute(states: RecurrentStates) -> torch.Tensor:
        return states.convolve(1, x, weight, bias, activation)

    require_equal((taps - 1, channels), dtype, REORDERED_SUMS[dtype], step, compute)


def delta(tokens: int, dtype: torch.dtype, heads: int, key_heads: int, key_size: int, value_size: int) -> Any:
    joined = torch.randn(1, tokens, 2 * key_heads * key_size + heads * value_size).to(dtype)
    query, key, value = joined.split((key_heads * key_size, key_heads * key_size, heads * value_size), dim=-1)
    return {
        "query": query.unflatten(-1, (key_heads, key_size)),
        "key": key.unflatten(-1, (key_heads, key_size)),
        "value": value.unflatten(-1, (heads, value_size)),
        "beta": torch.rand(1, tokens, heads).to(dtype),
        "g": -torch.rand(1, tokens, heads),
        "use_qk_l2norm_in_kernel": True,
    }


def gated_by_channel(tokens: int, dtype: torch.dtype, *sizes: int) -> Any:
    return {**delta(tokens, dtype, *sizes), "g": -torch.rand(1, tokens, sizes[0], sizes[2])}


def mamba2(tokens: int, dtype: torch.dtype, heads: int, groups: int, size: int, width: int) -> Any:
    joined = torch.randn(1, tokens, heads * size + 2 * groups * width + heads).to(dtype)
    x, writing, reading, dt = joined.split((heads * size, groups * width, groups * width, heads), dim=-1)
    return {
        "hidden_states": x.unflatten(-1, (heads, size)),
        "dt": dt * 4,
        "A": -torch.rand(heads),
        "B": writing.unflatten(-1, (groups, width)),
        "C": reading.unflatten(-1, (groups, width)),
        "D": torch.randn(heads).to(dtype),
        "dt_bias": torch.randn(heads).to(dtype) - 3,
        "dt_softplus": True,
        "chunk_size": 16,
    }


def plain_mamba2(tokens: int, dtype: torch.dtype, *sizes: int) -> Any:
    """Without all that may be left out, and with bounds of the step."""
    given = {**mamba2(tokens, dtype, *sizes), "dt_softplus": False, "dt_limit": (0.1, 2.0)}
    del given["D"], given["dt_bias"]
    return given


CASES: dict[str, tuple[Recurrence, Any, Any, tuple[int, ...], tuple[int, ...]]] = {
    "gated delta": (DELTA, torch_chunk_gated_delta_rule, delta, (4, 2, 16, 32), (4, 16, 32)),
    "gated delta of odd sizes": (DELTA, torch_chunk_gated_delta_rule, delta, (3, 3, 12, 40), (3, 12, 40)),
    "gated delta of wide heads": (DELTA, torch_chunk_gated_delta_rule, delta, (2, 1, 128, 128), (2, 128, 128)),
    "gates by channel": (DELTA, chunk_kimi_delta_attention, gated_by_channel, (2, 2, 16, 16), (2, 16, 16)),
    "mamba 2": (MAMBA2, mamba2_chunk_scan, mamba2, (4, 2, 16, 8), (4, 16, 8)),
    "mamba 2 of odd sizes": (MAMBA2, mamba2_chunk_scan, mamba2, (3, 1, 20, 12), (3, 20, 12)),
    "mamba 2 of wide states": (MAMBA2, mamba2_chunk_scan, mamba2, (2, 1, 64, 128), (2, 64, 128)),
    "mamba 2 with nothing more": (MAMBA2, mamba2_chunk_scan, plain_mamba2, (4, 4, 16, 8), (4, 16, 8)),
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("case", CASES)
def test_recurrences(case: str, step: str, dtype: torch.dtype) -> None:
    recurrence, operator, make, sizes, shape = CASES[case]
    torch.manual_seed(0)
    arguments = make(sum(STEPS[step]), dtype, *sizes)

    def compute(states: RecurrentStates) -> torch.Tensor:
        return states.recur(1, recurrence, unwrap(operator), arguments)

    require_equal(shape, torch.float32, REORDERED_SUMS[dtype], step, compute)


@pytest.mark.parametrize("dt", [-30.0, -3.0, 0.0, 3.0, 19.0, 21.0, 80.0])
def test_the_step_of_a_state_space_model(dt: float) -> None:
    """Softplus keeps all digits of small steps, which ``log(1 + e)`` has not."""
    arguments = mamba2(1, torch.float32, 1, 1, 1, 1)
    arguments |= {"dt": torch.full((1, 1, 1), dt), "dt_bias": torch.zeros(1), "D": torch.zeros(1)}
    first, second = caches((1, 1, 1))
    outs = []
    for cache, make in ((first, RecurrentStates), (second, TritonStates)):
        cache.states[1].zero_()
        states = make(cache)
        states.prepare(batch_of((1,)))
        outs.append(states.recur(1, MAMBA2, unwrap(mamba2_chunk_scan), arguments))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=0.0)


def test_what_pads_a_recorded_step_touches_its_own_slot_only() -> None:
    """Three rows of padding share a slot, as in a recorded step of four decodes that has one."""
    torch.manual_seed(0)
    arguments = delta(4, torch.float32, 2, 2, 8, 8)
    x, weight = torch.randn(1, 12, 4), torch.randn(12, 4)
    scratch = NUM_SLOTS - 1
    found = []
    for recorded in (True, False):
        cache = StateCache([StateShape((3, 12), torch.float32), StateShape((2, 8, 8), torch.float32)], NUM_SLOTS, CPU)
        for state in cache.states:
            state.copy_(torch.randn(state.shape, generator=torch.Generator().manual_seed(1)))
        states = TritonStates(cache)
        rows = 4 if recorded else 1
        if recorded:
            states.reserve(4)
            slots = array("i", [2] + [scratch] * 3)
            padded = FlatBatch(*(array("i", [0] * 4) for _ in range(5)), (), state_slots=slots)
            states.fill(padded)
            states.capture(StepShape(4, only_decodes=True))
        else:
            alone = batch_of((1,))
            alone.state_slots[0] = 2
            states.prepare(alone)
        taken = {name: numbers[:, :rows] for name, numbers in arguments.items() if name in DELTA.by_token}
        out = states.recur(1, DELTA, unwrap(torch_chunk_gated_delta_rule), {**arguments, **taken})
        convolved = states.convolve(0, x[..., :rows], weight, None, "silu")
        found.append((out[:, 0], convolved[..., 0], *(state[:scratch] for state in cache.states)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_what_the_kernels_do_not_take_is_left_to_torch() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 8, 8), torch.randn(8, 20)  # wider than is written out
    (expecting, finding) = caches((19, 8))
    outs = []
    for cache, make in ((expecting, RecurrentStates), (finding, TritonStates)):
        states = make(cache)
        states.prepare(batch_of((5, 1, 2)))
        outs.append(states.convolve(1, x, weight, None, None))
    assert torch.equal(*outs)
    assert torch.equal(expecting.states[1], finding.states[1])


def test_a_wrong_slot_would_be_seen() -> None:
    """The comparison of this file, on states that are read from the neighbour."""

    class Shifted(TritonStates):
        def prepare(self, batch: FlatBatch) -> None:
            super().prepare(batch)
            self._step = self._step._replace(slots=(self._step.slots + 1) % NUM_SLOTS)

    arguments = delta(3, torch.float32, 2, 2, 8, 8)
    outs = []
    for cache, make in zip(caches((2, 8, 8)), (RecurrentStates, Shifted), strict=True):
        states = make(cache)
        states.prepare(batch_of((1, 1, 1)))
        outs.append(states.recur(1, DELTA, unwrap(torch_chunk_gated_delta_rule), arguments))
    assert difference(outs[1], outs[0]) > 0.1

"""Recurrent states in C: what torch computes, for sizes of every kind."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial

import pytest
import torch

from engine.cache.state_tensors import StateCache, StateShape
from engine.closeness import difference
from engine.native.library import load_library
from engine.native.states import NativeStates
from engine.recurrent.recurrences import DeltaInputs, Inputs, Mamba2Inputs
from engine.recurrent.states import RecurrentStates
from engine.scheduling.flat_batch import FlatBatch

CPU = torch.device("cpu")
SLOTS = torch.tensor([4, 0, 3])
Make = Callable[[StateCache], RecurrentStates]


@pytest.fixture(scope="module")
def in_c(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return partial(NativeStates, code=load_library(tmp_path_factory.mktemp("native")), threads=3)


def filled(shape: tuple[int, ...]) -> StateCache:
    """Beside the state another one, so that slots do not lie one after another."""
    cache = StateCache([StateShape((7,), torch.float32), StateShape(shape, torch.float32)], 5, CPU)
    for state in cache.states:
        state.copy_(torch.randn(state.shape, generator=torch.Generator().manual_seed(1)))
    return cache


def delta(heads: int, key_heads: int, key_size: int, value_size: int, *gates: int) -> Inputs:
    return DeltaInputs(
        torch.randn(3, key_heads, key_size),
        torch.randn(3, key_heads, key_size),
        torch.randn(3, heads, value_size),
        torch.rand(3, heads),
        torch.rand(3, heads, *gates),
    )


def mamba2(heads: int, groups: int, size: int, width: int, *, skip: bool) -> Inputs:
    return Mamba2Inputs(
        torch.randn(3, heads, size),
        torch.rand(3, heads),
        torch.rand(3, heads),
        torch.randn(3, groups, width),
        torch.randn(3, groups, width),
        torch.randn(heads) if skip else None,
    )


@pytest.mark.parametrize(
    ("inputs", "shape"),
    [
        (delta(4, 2, 128, 128), (4, 128, 128)),
        (delta(3, 3, 7, 100), (3, 7, 100)),
        (delta(2, 1, 16, 5), (2, 16, 5)),
        (delta(2, 2, 16, 64, 16), (2, 16, 64)),
        (mamba2(4, 2, 64, 128, skip=True), (4, 64, 128)),
        (mamba2(3, 1, 5, 37, skip=False), (3, 5, 37)),
    ],
    ids=["delta", "odd", "small", "gates", "mamba2", "odd mamba2"],
)
def test_a_token_of_each_sequence(inputs: Inputs, shape: tuple[int, ...], in_c: Make) -> None:
    caches = [filled(shape), filled(shape)]
    found, expected = (
        make(cache).advance(1, inputs, SLOTS) for make, cache in zip((in_c, RecurrentStates), caches, strict=True)
    )
    assert difference(found, expected) < 1e-5
    for one, other in zip(caches[0].states, caches[1].states, strict=True):
        assert difference(one, other) < 1e-5


@pytest.mark.parametrize("taps", [2, 4, 16])
@pytest.mark.parametrize("channels", [3, 1100])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_convolution_of_chunks_and_decodes(taps: int, channels: int, has_bias: bool, in_c: Make) -> None:
    lengths = [1, 20, 2, 1]
    starts = [0, 1, 21, 23]
    batch = FlatBatch(
        array("i", [0] * 24),
        array("i", [0] * 24),
        array("i", starts),
        array("i", lengths),
        array("i"),
        (),
        state_slots=array("i", [4, 0, 3, 2]),
    )
    x, weight = torch.randn(1, channels, 24), torch.randn(channels, taps)
    bias = torch.randn(channels) if has_bias else None
    results = []
    for make in (in_c, RecurrentStates):
        cache = filled((taps - 1, channels))
        states = make(cache)
        states.prepare(batch)
        results.append((states.convolve(1, x, weight, bias), *cache.states))
    for found, expected in zip(*results, strict=True):
        assert difference(found, expected) < 1e-5


def test_other_types_are_left_to_torch(in_c: Make) -> None:
    cache = StateCache([StateShape((3, 8), torch.bfloat16)], 1, CPU)
    states = in_c(cache)
    states.prepare(
        FlatBatch(*(array("i", numbers) for numbers in ([0], [0], [0], [1], [])), (), state_slots=array("i", [0]))
    )
    out = states.convolve(0, torch.ones(1, 8, 1, dtype=torch.bfloat16), torch.ones(8, 4, dtype=torch.bfloat16), None)
    assert out.dtype == torch.bfloat16
    assert out.flatten().tolist() == [1.0] * 8

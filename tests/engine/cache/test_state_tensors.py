"""The tensors of recurrent states: sizes, alignment, and slots that are cleared and copied whole."""

from __future__ import annotations

import torch

from engine.cache.state_tensors import StateCache, StateShape, slot_bytes

CPU = torch.device("cpu")
SHAPES = [
    StateShape((3, 5), torch.bfloat16),
    StateShape((2, 4, 4), torch.float32),
    StateShape((7,), torch.float32),
]


def test_states_lie_aligned_and_apart() -> None:
    cache = StateCache(SHAPES, 4, CPU)
    assert slot_bytes(SHAPES) == 64 + 128 + 64
    for number, (state, shape) in enumerate(zip(cache.states, SHAPES, strict=True)):
        assert state.shape == (4, *shape.shape)
        assert state.dtype == shape.dtype
        assert state[1].data_ptr() % 64 == state[0].data_ptr() % 64
        state.fill_(number + 1)
    assert [float(state.float().min()) for state in cache.states] == [1, 2, 3]
    assert [float(state.float().max()) for state in cache.states] == [1, 2, 3]


def test_a_slot_is_copied_and_cleared_whole() -> None:
    cache = StateCache(SHAPES, 4, CPU)
    for state in cache.states:
        state[1] = 5
        state[2] = 6
    cache.copy(torch.tensor([1, 2]), torch.tensor([3, 0]))
    cache.clear(torch.tensor([1]))
    for state in cache.states:
        assert [set(state[slot].flatten().tolist()) for slot in range(4)] == [{6}, {0}, {6}, {5}]


def test_a_model_without_states_takes_nothing() -> None:
    cache = StateCache([], 8, CPU)
    assert slot_bytes([]) == 0
    assert cache.states == []


def test_qwen35_27b_takes_what_its_config_says() -> None:
    """48 delta nets of 48 heads of 128 x 128, and convolutions over 3 tokens of 10,240 channels."""
    layer = [StateShape((10240, 3), torch.bfloat16), StateShape((48, 128, 128), torch.float32)]
    assert slot_bytes(layer * 48) == 48 * (10240 * 3 * 2 + 48 * 128 * 128 * 4)

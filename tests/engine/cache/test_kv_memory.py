"""The size of the cache: pages, and a context that it is sure to hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.api.block_groups import Window, sequence_blocks
from engine.api.errors import ModelRefused
from engine.cache.kv_tensors import KVCache
from engine.cache.layout import GroupDemand, KVShape, block_bytes, plan_caches, sequence_bytes

CPU = torch.device("cpu")
SHAPES = [KVShape(2, 16, 16), KVShape(1, 32, 8)]
LATENT = KVShape(1, 576, 512, values_in_keys=True)


@pytest.mark.parametrize("fp8", [False, True])
def test_bytes_of_a_page_are_those_of_the_tensors(fp8: bool) -> None:
    cache = KVCache(SHAPES, 5, 4, dtype=torch.bfloat16, device=CPU, fp8=fp8)
    scales = [*cache.key_scales, *cache.value_scales]
    tensors = [*cache.keys, *cache.values, *(tensor for tensor in scales if tensor is not None)]
    assert len(tensors) == (8 if fp8 else 4)
    assert sum(tensor.nbytes for tensor in tensors) == 5 * block_bytes(SHAPES, 4, torch.bfloat16, fp8=fp8)
    tensors = [tensor.view(torch.uint8) for tensor in tensors]
    assert not any(tensor.any() for tensor in tensors)
    assert cache.keys[1].shape == (5, 4, 1, 32)
    assert cache.values[1].shape == (5, 4, 1, 8)


@pytest.mark.parametrize("fp8", [False, True])
def test_values_that_lie_in_keys_take_no_memory(fp8: bool) -> None:
    cache = KVCache([LATENT], 5, 4, dtype=torch.bfloat16, device=CPU, fp8=fp8)
    (keys,), (values,) = cache.keys, cache.values
    assert keys.shape == (5, 4, 1, 576)
    assert values.shape == (5, 4, 1, 512)
    keys.view(torch.uint8).fill_(1)
    assert values.view(torch.uint8).all()
    (scales,) = cache.key_scales
    assert cache.value_scales[0] is scales
    held = keys.nbytes + (0 if scales is None else scales.nbytes)
    assert held == 5 * block_bytes([LATENT], 4, torch.bfloat16, fp8=fp8)


def test_glm_4_7_flash_takes_54_kilobytes_a_token() -> None:
    """47 layers, and 20 heads of keys and values of 256 where they are expanded."""
    assert block_bytes([LATENT] * 47, 1, torch.bfloat16) == 47 * 576 * 2 == 54_144
    assert block_bytes([KVShape(20, 256, 256)] * 47, 1, torch.bfloat16) == 962_560


def test_fp8_holds_nearly_twice_the_tokens() -> None:
    shapes = [KVShape(8, 128, 128)] * 32
    assert 1.98 < block_bytes(shapes, 16, torch.bfloat16) / block_bytes(shapes, 16, torch.bfloat16, fp8=True) < 2


def test_a_cache_smaller_than_a_page_is_refused_with_both_numbers() -> None:
    with pytest.raises(ModelRefused, match=r"99 bytes.*100"):
        plan_caches(99, [GroupDemand(100)], 16, 512, 8)


@given(
    blocks=st.integers(1, 500), block_size=st.integers(1, 64), context=st.integers(1, 4000), running=st.integers(1, 16)
)
def test_a_lone_sequence_always_fits(blocks: int, block_size: int, context: int, running: int) -> None:
    plan = plan_caches(blocks * 100, [GroupDemand(100)], block_size, context, running)
    (group,) = plan.groups
    assert 1 <= group.num_blocks <= blocks
    assert 1 <= plan.max_context <= context
    assert -(-plan.max_context // block_size) <= group.num_blocks
    if blocks * block_size >= context:
        assert plan.max_context == context


WINDOWS = st.none() | st.builds(Window, st.integers(1, 600), chunked=st.booleans())


@given(
    budget=st.integers(1, 200_000),
    demands=st.lists(st.builds(GroupDemand, st.integers(1, 90), WINDOWS), min_size=1, max_size=3),
    block_size=st.integers(1, 32),
    context=st.integers(1, 3000),
    running=st.integers(1, 16),
    launched=st.integers(1, 500),
)
def test_a_budget_is_split_so_that_one_sequence_fits_every_group(
    budget: int, demands: list[GroupDemand], block_size: int, context: int, running: int, launched: int
) -> None:
    try:
        plan = plan_caches(budget, demands, block_size, context, running, launched=launched)
    except ModelRefused:
        assert budget < sum(demand.bytes_per_block for demand in demands)
        return

    def taken(tokens: int, launched: int) -> int:
        counts = [sequence_blocks(demand.window, tokens, block_size, launched) for demand in demands]
        return sum(count * demand.bytes_per_block for count, demand in zip(counts, demands, strict=True))

    pairs = list(zip(plan.groups, demands, strict=True))
    assert sum(group.num_blocks * demand.bytes_per_block for group, demand in pairs) <= budget
    assert [group.window for group in plan.groups] == [demand.window for demand in demands]
    for group in plan.groups:
        assert group.num_blocks >= sequence_blocks(group.window, plan.max_context, block_size, launched)
        most = sequence_blocks(group.window, plan.max_context, block_size, launched)
        most += (running - 1) * sequence_blocks(group.window, plan.max_context, block_size, 1)
        assert group.num_blocks <= most
    if plan.max_context < context:
        assert taken(plan.max_context + block_size, launched) > budget, "no longer context fits"


def test_layers_with_a_window_leave_the_memory_to_those_without() -> None:
    """Gemma 3 at 8,192 tokens: five of six layers have a window of 512."""
    full, windowed = GroupDemand(100), GroupDemand(500, Window(512))
    plan = plan_caches(100_000_000, [full, windowed], 16, 8192, 64, launched=4096)
    assert [group.num_blocks for group in plan.groups] == [512 * 64, (512 + 4096) // 16 + 1 + 63 * (513 // 16 + 2)]
    assert sequence_bytes([full, windowed], 8192, 16) == 512 * 100 + (513 // 16 + 2) * 500
    tight = plan_caches(1_000_000, [full, windowed], 16, 8192, 64, launched=4096)
    assert tight.max_context == 8192
    assert tight.groups[0].num_blocks > 5 * tight.groups[1].num_blocks

"""Both backends against attention in float64, over everything that a layer and a step may be."""

from __future__ import annotations

import math
import random
from array import array
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.attention_bounds import assert_within, attended
from support.examples import examples
from support.paged import make_sequence

from engine.api.block_groups import Window
from engine.attention.base import AttentionOptions
from engine.attention.gather import ReferenceAttention
from engine.attention.step_index import MOST_SPLITS
from engine.attention.triton_paged import TritonAttention
from engine.cache.fp8 import dequantise
from engine.cache.kv_tensors import KVCache
from engine.cache.layout import KVShape
from engine.scheduling.flat_batch import StepShape, flatten
from engine.scheduling.sequence import ScheduledChunk

CPU = torch.device("cpu")
TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """A layer, a step of chunks (tokens before, tokens now), and how busy the device is."""

    shape: KVShape
    group: int
    options: AttentionOptions
    chunks: tuple[tuple[int, int], ...]
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    processors: int = 1
    fp8: bool = False


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = st.sampled_from((8, 16, 20, 64, 80))
    group = draw(st.sampled_from((1, 2, 3, 7, 16, 20)))
    kv_heads = draw(st.integers(1, 3))
    sinks = torch.randn(kv_heads * group, generator=torch.Generator().manual_seed(0)) if draw(st.booleans()) else None
    seen = draw(st.none() | st.builds(Window, st.integers(1, 90), st.booleans()))
    options = AttentionOptions(
        scaling=draw(st.sampled_from((0.05, 0.25, 1.0))),
        sliding_window=seen.size if seen and not seen.chunked else None,
        softcap=draw(st.none() | st.sampled_from((1.5, 50.0))),
        sinks=sinks,
        chunk_size=seen.size if seen and seen.chunked else None,
    )
    chunk = st.tuples(st.integers(0, 150), st.just(1) | st.integers(2, 40))
    return Case(
        shape=KVShape(kv_heads, draw(sizes), draw(sizes)),
        group=group,
        options=options,
        chunks=tuple(draw(st.lists(chunk, min_size=1, max_size=5))),
        block_size=draw(st.sampled_from((1, 4, 16, 24))),
        processors=draw(st.sampled_from((1, 8, 132))),
        fp8=draw(st.booleans()),
    )


def compare(case: Case) -> None:
    """Write and attend through both backends; the blocks must be equal, the results as exact as their arithmetic."""
    torch.manual_seed(0)
    chunks, num_blocks = laid_out(case)
    ours, theirs = (
        KVCache([case.shape], num_blocks, case.block_size, dtype=case.dtype, device=CPU, fp8=case.fp8) for _ in range(2)
    )
    for mine, other in zip(stored(ours), stored(theirs), strict=True):
        mine.copy_(torch.randint(115, 125, mine.shape) if mine.dtype == torch.uint8 else torch.randn(mine.shape))
        other.copy_(mine)
    tokens, heads = sum(chunk.num_tokens for chunk in chunks), case.shape.heads * case.group
    keys = torch.randn(case.shape.heads, tokens, case.shape.key_size).to(case.dtype).transpose(0, 1)
    values = torch.randn(tokens, case.shape.heads, case.shape.value_size).to(case.dtype)
    keys[0, 0, 0], values[-1, -1, -1] = math.nan, -math.inf
    keys[-1] *= 1000
    values[0] /= 1000
    query = torch.randn(heads, tokens, case.shape.key_size).to(case.dtype).transpose(0, 1)
    reference = ReferenceAttention(theirs)
    triton = TritonAttention(ours, processors=case.processors)
    for backend in (reference, triton):
        backend.prepare(flatten(chunks, case.block_size, [case.options.window]))
        backend.write_kv(0, keys, values)
    for mine, other in zip(stored(ours), stored(theirs), strict=True):
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))
    exact, bound = exactly(case, chunks, theirs, query)
    for backend in (triton, reference):
        assert_within(backend.attend(0, query, case.options), exact, bound)


def stored(cache: KVCache) -> list[torch.Tensor]:
    """Keys and values of the first layer, and their scales where it has any."""
    found = (cache.keys[0], cache.values[0], cache.key_scales[0], cache.value_scales[0])
    return [tensor for tensor in found if tensor is not None]


def exactly(
    case: Case, chunks: list[ScheduledChunk], cache: KVCache, query: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step in float64, and how far each number may lie from it."""
    parts, first = [], 0
    for chunk in chunks:
        keys, values = (
            wide(blocks[0], scales[0])[chunk.sequence.blocks].flatten(0, 1)[: chunk.start + chunk.num_tokens]
            for blocks, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales))
        )
        queries = query[first : first + chunk.num_tokens]
        parts.append(attended(queries, keys, values, chunk.start, case.options))
        first += chunk.num_tokens
    exact, bound = zip(*parts, strict=True)
    return torch.cat(exact), torch.cat(bound)


def wide(blocks: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    return blocks if scales is None else dequantise(blocks, scales, torch.float32)


def laid_out(case: Case) -> tuple[list[ScheduledChunk], int]:
    """The chunks with their blocks scattered over a pool, and the size of the pool."""
    needed = [-(-(past + count) // case.block_size) for past, count in case.chunks]
    num_blocks = sum(needed) + 3
    free = random.Random(0).sample(range(num_blocks), num_blocks)
    chunks = []
    for (past, count), blocks in zip(case.chunks, needed, strict=True):
        sequence = make_sequence([1] * (past + count), [free.pop() for _ in range(blocks)])
        chunks.append(ScheduledChunk(sequence, past, count))
    return chunks, num_blocks


@given(case=cases())
@example(case=Case(KVShape(1, 64, 64), 20, AttentionOptions(1.0), ((120, 1),)))
@settings(max_examples=examples(30), suppress_health_check=list(HealthCheck))
def test_any_step_of_any_layer(case: Case) -> None:
    compare(case)


SHAPE = KVShape(heads=2, key_size=64, value_size=64)
STEP = ((0, 70), (300, 1), (2, 1), (130, 35), (0, 1), (31, 1))
SINKS = torch.linspace(-1, 3, 8)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_types(dtype: torch.dtype, fp8: bool) -> None:
    compare(Case(SHAPE, 4, AttentionOptions(0.125, 40, 5.0, SINKS), STEP, dtype=dtype, processors=8, fp8=fp8))


@pytest.mark.parametrize(("processors", "fp8"), [(1, False), (4, True), (16, False), (10_000, True)])
def test_splits_of_a_long_context(processors: int, fp8: bool) -> None:
    compare(Case(SHAPE, 4, AttentionOptions(0.125), ((4_000, 1), (3, 1)), processors=processors, fp8=fp8))


def test_more_splits_than_keys_and_sinks_counted_once() -> None:
    options = AttentionOptions(0.125, sinks=SINKS)
    compare(Case(SHAPE, 4, options, ((0, 1), (1, 1), (63, 1), (64, 1)), processors=MOST_SPLITS * 8))


@pytest.mark.parametrize(("window", "fp8"), [(1, True), (63, False), (64, False), (64, True), (65, False), (200, True)])
def test_windows_at_the_borders_of_tiles(window: int, fp8: bool) -> None:
    step = ((500, 1), (190, 70), (0, 130))
    compare(Case(SHAPE, 2, AttentionOptions(0.125, window), step, processors=16, fp8=fp8))


# Every two of size, type and fp8 meet: each pair of a type and fp8 with two of four sizes.
PAIRED = [(place, dtype, (place + (dtype is torch.bfloat16)) % 2 == 1) for place in range(4) for dtype in TYPES[::2]]


@pytest.mark.parametrize(("place", "dtype", "fp8"), PAIRED, ids=str)
def test_wide_heads(place: int, dtype: torch.dtype, fp8: bool) -> None:
    size = (80, 128, 192, 256)[place]
    step = ((90, 1), (10, 40))
    compare(Case(KVShape(1, size, size), 4, AttentionOptions(0.06), step, dtype=dtype, processors=4, fp8=fp8))


LATENTS = ((24, 16, 7), (40, 32, 20), (28, 20, 4), (320, 256, 40))


@pytest.mark.parametrize(("place", "dtype", "fp8"), PAIRED, ids=str)
def test_values_that_lie_in_the_keys(place: int, dtype: torch.dtype, fp8: bool) -> None:
    """Decodes alone and shared, and chunks with and without a past; more query heads than rows, and odd numbers."""
    key_size, value_size, heads = LATENTS[place]
    shape = KVShape(1, key_size, value_size, values_in_keys=True)
    step = STEP if key_size < 100 else ((300, 1), (10, 11))
    compare(Case(shape, heads, AttentionOptions(0.05), step, dtype=dtype, processors=16, fp8=fp8))


@pytest.mark.parametrize(
    ("heads", "dtype"), [(20, torch.float32), (20, torch.bfloat16), (128, torch.bfloat16)], ids=str
)
def test_latents_of_576_numbers(heads: int, dtype: torch.dtype) -> None:
    shape = KVShape(1, 576, 512, values_in_keys=True)
    compare(Case(shape, heads, AttentionOptions(0.02), ((150, 1), (20, 5)), dtype=dtype, processors=8))


def test_latents_with_all_that_a_layer_may_ask_for() -> None:
    shape, sinks = KVShape(1, 40, 32, values_in_keys=True), torch.linspace(-1, 3, 36)
    step = ((300, 1), (90, 40), (0, 9))
    compare(Case(shape, 36, AttentionOptions(0.05, 70, 5.0, sinks), step, processors=16))


@pytest.mark.parametrize("fp8", [False, True])
def test_a_block_that_held_nothing_finite_cannot_exist(fp8: bool) -> None:
    cache = KVCache([SHAPE], 1, 4, dtype=torch.float32, device=CPU, fp8=fp8)
    backend = TritonAttention(cache)
    backend.prepare(flatten([ScheduledChunk(make_sequence([1] * 4, [0]), 0, 4)], 4))
    backend.write_kv(0, torch.full((4, 2, 64), math.nan), torch.full((4, 2, 64), math.inf))
    assert not cache.keys[0].float().any()
    assert not cache.values[0].float().any()


SHAPES = (StepShape(40, only_decodes=False), StepShape(6, only_decodes=True))
RECORDED = {
    "chunks and decodes": ((0, 9), (70, 1), (700, 1), (130, 5), (3, 1)),
    "as many chunks as sequences": ((0, 2),) * 6,
    "one chunk": ((25, 40),),
    "decodes": ((70, 1), (700, 1), (3, 1)),
    "no decode": ((17, 33), (0, 6)),
    "one token is missing": ((5, 39),),
    "nothing": (),
}


LATENT = KVShape(1, 40, 32, values_in_keys=True)
ALL_OPTIONS = AttentionOptions(0.125, 40, 5.0, SINKS)
RECORDED_LAYERS = {
    "plain": (SHAPE, AttentionOptions(0.125), False),
    "plain, fp8": (SHAPE, AttentionOptions(0.125), True),
    "all options": (SHAPE, ALL_OPTIONS, False),
    "all options, fp8": (SHAPE, ALL_OPTIONS, True),
    "latent, fp8": (LATENT, AttentionOptions(0.125), True),
}


@pytest.mark.parametrize(("layer", "options", "fp8"), RECORDED_LAYERS.values(), ids=RECORDED_LAYERS)
def test_a_recorded_step_has_the_numbers_of_the_step_itself(
    layer: KVShape, options: AttentionOptions, fp8: bool
) -> None:
    """Each shape takes all steps one after another, so that what one leaves behind would show in the next."""
    torch.manual_seed(0)
    scratch, size, heads = 200, 16, 8
    caches = [KVCache([layer], 201, size, dtype=torch.float32, device=CPU, fp8=fp8) for _ in range(2)]
    for numbers in zip(*map(stored, caches), strict=True):
        scales = numbers[0].dtype == torch.uint8
        numbers[0].copy_(torch.full(numbers[0].shape, 120) if scales else torch.randn(numbers[0].shape))
        numbers[1].copy_(numbers[0])
    plain, recorded = (TritonAttention(cache, processors=2) for cache in caches)
    recorded.reserve(SHAPES, 6, 100)
    for shape in SHAPES:
        for step in RECORDED.values():
            chunks, _ = laid_out(Case(layer, heads // layer.heads, options, step))
            real = sum(count for _, count in step)
            if shape.only_decodes and real > len(step):
                continue
            padding = [(0, 1)] * (shape.tokens - real) if shape.only_decodes else [(0, shape.tokens - real)]
            for past, count in padding if real < shape.tokens else []:
                blocks = [scratch] * -(-count // size)
                chunks.append(ScheduledChunk(make_sequence([1] * count, blocks), past, count))
            sizes = ((layer.heads, layer.key_size), (layer.heads, layer.value_size), (heads, layer.key_size))
            numbers = [torch.randn(shape.tokens, *each) for each in sizes]
            recorded.fill(flatten(chunks, size), shape)
            recorded.capture(shape)
            found = written_and_attended(recorded, numbers, options)
            assert found.isfinite().all()
            if step:
                plain.prepare(flatten(chunks[: len(step)], size))
                expected = written_and_attended(plain, [part[:real] for part in numbers], options)
                assert torch.equal(found[:real], expected)
            for mine, other in zip(*map(stored, caches), strict=True):
                assert torch.equal(mine[:scratch].view(torch.uint8), other[:scratch].view(torch.uint8))


def written_and_attended(
    backend: TritonAttention, numbers: list[torch.Tensor], options: AttentionOptions
) -> torch.Tensor:
    keys, values, query = numbers
    backend.write_kv(0, keys, values)
    return backend.attend(0, query, options)


def test_a_step_larger_than_the_buffer_before_it() -> None:
    compare(Case(KVShape(1, 16, 16), 1, AttentionOptions(0.25), ((0, 1500),)))


def test_what_the_kernels_do_not_compute_is_refused() -> None:
    cache = KVCache([SHAPE], 1, 4, dtype=torch.float32, device=CPU)
    backend = TritonAttention(cache)
    sequence = make_sequence([1, 1], [0])
    sequence.other_tables = ([0],)
    chunks = [ScheduledChunk(sequence, 0, 2)]
    with pytest.raises(NotImplementedError, match="attention by Triton cannot compute a step with key_limits"):
        backend.prepare(flatten(chunks, 4, key_limits=array("i", [2, 2])))
    with pytest.raises(ValueError, match="the step has 2 layer groups, and the cache 1"):
        backend.prepare(flatten(chunks, 4, [None, Window(4)]))

"""A step laid out flat against the plain definition of each of its parts."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.api.block_groups import Window
from engine.api.requests import Request, SamplingParams
from engine.scheduling.flat_batch import EmbeddingRows, FlatBatch, StepShape, flatten
from engine.scheduling.sequence import ScheduledChunk, Sequence

WINDOWS: list[Window | None] = [None, Window(3), Window(4, chunked=True)]


def chunk_of(past: int, count: int, tables: list[list[int]], *, further: int = 0) -> ScheduledChunk:
    """A chunk of ``count`` tokens after ``past``, of a sequence that knows ``further`` tokens beyond it."""
    tokens = [100 * past + i for i in range(past + count + further)]
    blocks, *others = (array("i", table) for table in tables)
    sequence = Sequence(Request("r", (1,), SamplingParams(1)), 0, tokens, blocks=blocks, other_tables=tuple(others))
    return ScheduledChunk(sequence, past, count)


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[ScheduledChunk], int, int]:
    """Chunks, the size of a block, and the number of layer groups."""
    block_size, num_groups = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    chunks = []
    for _ in range(draw(st.integers(0, 4))):
        past, count = draw(st.integers(0, 12)), draw(st.just(1) | st.integers(1, 9))
        needed = -(-(past + count) // block_size)
        sizes = st.lists(st.integers(0, 99), min_size=needed, max_size=needed + 2)
        tables = [draw(sizes) for _ in range(num_groups)]
        chunks.append(chunk_of(past, count, tables, further=draw(st.integers(0, 1))))
    return chunks, block_size, num_groups


@given(step=steps())
def test_every_part_is_what_its_definition_says(step: tuple[list[ScheduledChunk], int, int]) -> None:
    chunks, size, num_groups = step
    batch = flatten(chunks, size, WINDOWS[:num_groups])
    places = [(chunk, i) for chunk in chunks for i in range(chunk.start, chunk.start + chunk.num_tokens)]
    assert list(batch.tokens) == [chunk.sequence.tokens[i] for chunk, i in places]
    assert list(batch.positions) == [i for _, i in places]
    assert list(batch.query_lengths) == [chunk.num_tokens for chunk in chunks]
    assert list(batch.query_starts) == [sum(c.num_tokens for c in chunks[:i]) for i in range(len(chunks))]
    assert [batch.num_keys(i) for i in range(len(chunks))] == [chunk.start + chunk.num_tokens for chunk in chunks]
    ends = [start + length - 1 for start, length in zip(batch.query_starts, batch.query_lengths, strict=True)]
    assert list(batch.sample_rows) == [end for end, chunk in zip(ends, chunks, strict=True) if chunk.samples]
    assert batch.decodes == [i for i, chunk in enumerate(chunks) if chunk.num_tokens == 1]
    assert sorted(batch.decodes + batch.prefills) == list(range(len(chunks)))
    assert batch.only_decodes == (not batch.prefills)
    assert [blocks.window for blocks in batch.groups] == WINDOWS[:num_groups]
    for group, blocks in enumerate(batch.groups):
        tables = [[chunk.sequence.blocks, *chunk.sequence.other_tables][group] for chunk in chunks]
        own = {id(chunk): table for chunk, table in zip(chunks, tables, strict=True)}
        assert list(blocks.slots) == [own[id(chunk)][i // size] * size + i % size for chunk, i in places]
        for i, (chunk, table) in enumerate(zip(chunks, tables, strict=True)):
            needed, start = -(-(chunk.start + chunk.num_tokens) // size), blocks.table_starts[i]
            assert blocks.tables[start : start + needed] == table[:needed]


def test_a_chunk_beyond_its_blocks_or_tokens_is_refused() -> None:
    with pytest.raises(IndexError, match="9 tokens need 3 blocks of 4 and have 2"):
        flatten([chunk_of(8, 1, [[5, 6]])], 4)
    with pytest.raises(IndexError, match="9 tokens need 3 blocks of 4 and have 1"):
        flatten([chunk_of(3, 6, [[5, 6, 7], [1]])], 4, WINDOWS[:2])
    beyond = chunk_of(3, 6, [[5, 6, 7]])
    with pytest.raises(IndexError, match="beyond the tokens"):
        flatten([beyond._replace(num_tokens=8)], 4)


def test_missing_decodes_are_the_first_token_in_the_scratch_block() -> None:
    batch = flatten([chunk_of(5, 1, [[3, 4]]), chunk_of(0, 1, [[7]])], 4)
    padded = batch.padded(StepShape(4, only_decodes=True), [9], 4)
    assert [list(part) for part in (padded.tokens, padded.positions)] == [[505, 0, 0, 0], [5, 0, 0, 0]]
    assert list(padded.query_starts) == [0, 1, 2, 3]
    assert padded.only_decodes
    assert list(padded.sample_rows) == [0, 1]
    (blocks,) = padded.groups
    assert list(blocks.slots) == [17, 28, 36, 36]
    assert [blocks.tables[start] for start in blocks.table_starts] == [3, 7, 9, 9]
    assert batch.padded(StepShape(2, only_decodes=True), [9], 4) is batch


@given(step=steps(), missing=st.integers(0, 20))
def test_what_a_step_with_prefill_misses_is_one_chunk_within_the_scratch_block(
    step: tuple[list[ScheduledChunk], int, int], missing: int
) -> None:
    chunks, size, num_groups = step
    batch, scratch = flatten(chunks, size, WINDOWS[:num_groups]), [1000, 1001, 1002][:num_groups]
    padded = batch.padded(StepShape(len(batch.tokens) + missing, only_decodes=False), scratch, size)
    count = len(batch.tokens)
    assert padded.tokens == batch.tokens + array("i", [0] * missing)
    assert padded.positions == batch.positions + array("i", range(missing))
    assert padded.sample_rows == batch.sample_rows
    assert list(padded.query_lengths) == [*batch.query_lengths, *([missing] if missing else [])]
    assert list(padded.query_starts) == [*batch.query_starts, *([count] if missing else [])]
    for blocks, own, block in zip(padded.groups, batch.groups, scratch, strict=True):
        assert blocks.window == own.window
        assert blocks.slots[:count] == own.slots
        assert list(blocks.slots[count:]) == [block * size + i % size for i in range(missing)]
        table = blocks.tables[len(own.tables) :]
        assert list(table) == [block] * -(-missing // size)
        assert list(blocks.table_starts) == [*own.table_starts, *([len(own.tables)] if missing else [])]


@pytest.mark.parametrize("only_decodes", [False, True])
def test_tokens_of_long_texts_are_marked_and_padding_is_short(only_decodes: bool) -> None:
    chunks = [chunk_of(5, 1, [[3, 4]]), chunk_of(2, 1 if only_decodes else 3, [[7, 8]]), chunk_of(8, 1, [[1, 2, 5]])]
    for chunk, is_long in zip(chunks, (True, False, True), strict=True):
        chunk.sequence.is_long = is_long
    assert flatten(chunks, 4).long_tokens is None
    batch = flatten(chunks, 4, long_rope=True)
    marks = [1, 0, 1] if only_decodes else [1, 0, 0, 0, 1]
    assert batch.long_tokens == array("i", marks)
    assert batch.padded(StepShape(8, only_decodes), [9], 4).long_tokens == array("i", [*marks, *[0] * (8 - len(marks))])
    assert flatten([], 4, long_rope=True).long_tokens == array("i")


def test_a_step_is_not_padded_to_a_shape_that_it_does_not_fit() -> None:
    batch = flatten([chunk_of(0, 3, [[0]])], 4)
    for shape in (StepShape(2, only_decodes=False), StepShape(4, only_decodes=True)):
        with pytest.raises(AssertionError):
            batch.padded(shape, [9], 4)


OPTIONAL: dict[str, Any] = {
    "position_axes": (array("i", [0, 1]),) * 3,
    "embeddings": EmbeddingRows(array("i", [1]), [[0.5]]),
    "key_limits": array("i", [2, 2]),
    "long_tokens": array("i", [1, 1]),
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_who_cannot_compute_an_optional_field_refuses_it(name: str) -> None:
    batch: FlatBatch = replace(flatten([chunk_of(0, 2, [[0]])], 4), **{name: OPTIONAL[name]})
    batch.require_none(*(OPTIONAL.keys() - {name}), by="this")
    with pytest.raises(NotImplementedError, match=f"^this cannot compute a step with {name}"):
        batch.require_none(*OPTIONAL, by="this")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_axes": (array("i", [0]),)}, r"position_axes\[0\] has 1 positions for 2 tokens"),
        ({"embeddings": EmbeddingRows(array("i", [0, 1]), [[0.5]])}, "1 vectors for 2 rows"),
        ({"embeddings": EmbeddingRows(array("i", [2]), [[0.5]])}, "give rows from 0 to 1, ascending"),
        ({"embeddings": EmbeddingRows(array("i", [1, 0]), [[0.5]] * 2)}, "give rows from 0 to 1, ascending"),
        ({"embeddings": EmbeddingRows(array("i", [-1]), [[0.5]])}, "give rows from 0 to 1, ascending"),
        ({"key_limits": array("i", [1])}, "1 limits for 2 tokens"),
        ({"key_limits": array("i", [7, 7])}, r"key_limits\[1\] is 7, .* give a limit from 8 to 8"),
        ({"key_limits": array("i", [7, 9])}, r"key_limits\[1\] is 9"),
    ],
)
def test_what_does_not_fit_the_tokens_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flatten([chunk_of(6, 2, [[0, 1]])], 4, **fields)


def test_marks_that_do_not_fit_the_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="long_tokens has 1 entries for 2 tokens"):
        replace(flatten([chunk_of(6, 2, [[0, 1]])], 4), long_tokens=array("i", [1]))

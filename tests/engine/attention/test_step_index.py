from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples
from support.paged import make_sequence

from engine.attention.step_index import MIN_SHARE, MOST_SPLITS, IndexLayout, lay_out, layout_of
from engine.scheduling.flat_batch import FlatBatch, StepShape, flatten
from engine.scheduling.sequence import ScheduledChunk

BLOCK_SIZE = 16
STEPS = st.lists(st.tuples(st.integers(0, 9000), st.just(1) | st.integers(2, 40)), min_size=1, max_size=12)


def step_of(chunks: list[tuple[int, int]]) -> FlatBatch:
    works = []
    for number, (past, count) in enumerate(chunks):
        blocks = [number] * -(-(past + count) // BLOCK_SIZE)
        works.append(ScheduledChunk(make_sequence([1] * (past + count), blocks), past, count))
    return flatten(works, BLOCK_SIZE)


def items_of(numbers: array[int], layout: IndexLayout) -> list[tuple[int, ...]]:
    """Token, position, table, share and number of shares of each item."""
    parts = [layout.work_at + part * layout.work for part in range(5)]
    return list(zip(*(numbers[part : part + layout.work] for part in parts), strict=True))


@given(chunks=STEPS, programs=st.sampled_from((1, 7, 66, 528)), recorded=st.booleans())
@settings(max_examples=examples(100))
def test_every_token_and_every_share_is_there_once(
    chunks: list[tuple[int, int]], programs: int, recorded: bool
) -> None:
    batch = step_of(chunks)
    (blocks,) = batch.groups
    given_layout = layout_of(StepShape(len(batch.tokens), batch.only_decodes), 12, programs) if recorded else None
    numbers, layout = lay_out(batch, blocks, programs, given_layout)
    assert len(numbers) == layout.tables_at + len(blocks.tables)
    assert numbers[: layout.tokens] == batch.positions
    for token, table in enumerate(numbers[layout.tokens : layout.work_at]):
        chunk = sum(start <= token for start in batch.query_starts) - 1
        assert table == blocks.table_starts[chunk]
        assert numbers[layout.tables_at + table] == chunk
    items = [item for item in items_of(numbers, layout) if item[4]]
    assert not recorded or len(items) <= len(batch.decodes) + programs
    shares: dict[int, list[int]] = {}
    for place, (token, position, table, share, count) in enumerate(items):
        assert (position, table) == (batch.positions[token], numbers[layout.tokens + token])
        # The shares of a decode are neighbours, and those that are left elsewhere have numbers below this.
        assert items[place - share][:2] == (token, position)
        assert count == 1 or place < 2 * programs
        assert count <= MOST_SPLITS
        shares.setdefault(token, []).append(share)
        assert items[place - share][4] == count
    assert sorted(shares) == [batch.query_starts[chunk] for chunk in batch.decodes]
    for token, found in shares.items():
        count = next(item[4] for item in items if item[0] == token)
        assert found == list(range(count))
    number = numbers[layout.chunks_at]
    starts = numbers[layout.chunks_at + 1 :][:number]
    lengths = numbers[layout.chunks_at + 1 + layout.chunks :][:number]
    assert sorted(zip(starts, lengths, strict=True)) == [
        (batch.query_starts[chunk], batch.query_lengths[chunk]) for chunk in batch.prefills
    ]


def test_the_longest_chunk_and_the_longest_decode_come_first() -> None:
    batch = step_of([(3, 5), (9000, 1), (100, 2), (8000, 1), (50, 1)])
    numbers, layout = lay_out(batch, batch.groups[0], 8)
    assert numbers[layout.chunks_at : layout.chunks_at + 3] == array("i", [2, 6, 0])
    tokens = [item[0] for item in items_of(numbers, layout)]
    assert [token for place, token in enumerate(tokens) if token not in tokens[:place]] == [5, 8, 9]


def test_sequences_alike_are_not_shared_where_they_fill_the_device_themselves() -> None:
    batch = step_of([(4095, 1)] * 64)
    numbers, layout = lay_out(batch, batch.groups[0], 66)
    assert layout.work == 64
    assert {item[3:] for item in items_of(numbers, layout)} == {(0, 1)}


def test_a_long_sequence_among_short_ones_is_spread_over_the_device() -> None:
    batch = step_of([(32_767, 1), *[(200, 1)] * 63])
    numbers, layout = lay_out(batch, batch.groups[0], 66)
    items = items_of(numbers, layout)
    assert 30 <= items[0][4] <= 66
    assert {item[4] for item in items[items[0][4] :]} == {1}


def test_one_short_sequence_has_shares_that_pay() -> None:
    batch = step_of([(MIN_SHARE - 1, 1)])
    assert lay_out(batch, batch.groups[0], 528)[1].work == 1


def test_padding_changes_no_share() -> None:
    alone, padded = step_of([(9000, 1), (300, 1)]), step_of([(9000, 1), (300, 1), *[(0, 1)] * 30])
    shares = []
    for batch in (alone, padded):
        numbers, layout = lay_out(batch, batch.groups[0], 16)
        shares.append([item for item in items_of(numbers, layout) if item[1]])
    assert [item[3:] for item in shares[0]] == [item[3:] for item in shares[1]]


def test_a_step_that_is_not_of_the_shape_is_refused() -> None:
    batch = step_of([(5, 1), (5, 4)])
    for shape, most in ((StepShape(6, only_decodes=False), 2), (StepShape(5, only_decodes=True), 2)):
        with pytest.raises(AssertionError, match="a recorded step has"):
            lay_out(batch, batch.groups[0], 4, layout_of(shape, most, 4))

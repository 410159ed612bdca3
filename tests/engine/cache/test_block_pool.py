"""The block pool against a plain account of what each block holds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples

from engine.cache.block_pool import BlockPool


def admit(pool: BlockPool, tokens: list[int], salt: str = "") -> list[int]:
    """Allocate, compute and register a sequence as a scheduler would."""
    prefix = pool.find_prefix(tokens, salt)
    blocks = pool.allocate(pool.blocks_for(len(tokens)) - len(prefix), prefix)
    for index in range(len(prefix), len(tokens) // pool.block_size):
        pool.register(blocks, index, tokens, salt)
    return blocks


def test_a_released_prefix_is_found_again() -> None:
    pool = BlockPool(8, 2)
    blocks = admit(pool, [1, 2, 3, 4, 5])
    pool.release(blocks)
    assert pool.find_prefix([1, 2, 3, 4, 9], "") == blocks[:2]
    assert (pool.num_free, pool.num_cached, pool.num_used) == (6, 2, 0)
    pool.check([])


@pytest.mark.parametrize(("length", "covered"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2)])
def test_the_last_token_is_never_covered(length: int, covered: int) -> None:
    pool = BlockPool(8, 2)
    admit(pool, [1, 2, 3, 4, 5, 6])
    assert len(pool.find_prefix([1, 2, 3, 4, 5, 6][:length], "")) == covered


def test_only_registered_blocks_are_found() -> None:
    pool = BlockPool(8, 2)
    blocks = pool.allocate(2)
    pool.register(blocks, 0, [1, 2, 3, 4], "")
    assert pool.find_prefix([1, 2, 3, 4, 5], "") == blocks[:1]


def test_salts_do_not_share() -> None:
    pool = BlockPool(8, 2)
    admit(pool, [1, 2, 3], "a")
    assert pool.find_prefix([1, 2, 3], "b") == []
    assert pool.find_prefix([1, 2, 3], "a") != []


def test_equal_hashes_do_not_share() -> None:
    # hash(-1) == hash(-2) in CPython, so these tokens collide in whatever is built on hash().
    assert hash((-1, 7)) == hash((-2, 7))
    pool = BlockPool(8, 2)
    admit(pool, [-1, 7, 3])
    assert pool.find_prefix([-2, 7, 3], "") == []


def test_the_same_tokens_behind_another_prefix_do_not_share() -> None:
    pool = BlockPool(8, 2)
    blocks = admit(pool, [1, 1, 2, 2, 3])
    assert pool.find_prefix([2, 2, 3], "") == []
    assert pool.find_prefix([1, 1, 2, 2, 3], "") == blocks[:2]


def test_what_follows_a_prefix_that_was_computed_twice_is_found() -> None:
    pool = BlockPool(8, 2)
    first, second = pool.allocate(1), pool.allocate(2)
    pool.register(first, 0, [1, 1], "")
    pool.register(second, 0, [1, 1, 2, 2], "")
    pool.register(second, 1, [1, 1, 2, 2], "")
    assert pool.find_prefix([1, 1, 2, 2, 3], "") == [first[0], second[1]]
    pool.release(second)
    assert (pool.num_cached, pool.num_free) == (1, 6)
    pool.check([first])


def test_a_prefix_behind_an_evicted_block_is_not_joined_to_its_successor() -> None:
    pool = BlockPool(3, 2)
    first = admit(pool, [1, 1, 2, 2])
    twin = pool.allocate(1)
    pool.register(twin, 0, [1, 1], "")
    pool.release(first[:1])
    other = pool.allocate(1)
    assert other == first[:1]
    pool.register(other, 0, [9, 9], "")
    assert pool.find_prefix([9, 9, 2, 2, 3], "") == other
    pool.check([first[1:], twin, other])


def test_the_tail_is_evicted_before_the_head() -> None:
    pool = BlockPool(3, 2)
    blocks = admit(pool, [1, 1, 2, 2, 3, 3])
    pool.release(blocks)
    pool.allocate(1)
    assert pool.find_prefix([1, 1, 2, 2, 3, 3, 4], "") == blocks[:2]


def test_the_least_recently_used_is_evicted_first() -> None:
    pool = BlockPool(2, 2)
    old, new = admit(pool, [1, 1]), admit(pool, [2, 2])
    pool.release(old)
    pool.release(new)
    pool.release(pool.allocate(0, old))
    assert pool.allocate(1) == new


def test_asking_counts_the_cached_blocks_of_the_prefix() -> None:
    pool = BlockPool(3, 2)
    pool.release(admit(pool, [1, 1, 2, 2]))
    prefix = pool.find_prefix([1, 1, 2, 2, 3], "")
    assert pool.can_allocate(1, prefix)
    assert not pool.can_allocate(2, prefix)
    with pytest.raises(AssertionError, match="can_allocate"):
        pool.allocate(2, prefix)
    pool.check([])


def test_check_sees_a_lost_block() -> None:
    pool = BlockPool(2, 2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check([])


Operation = tuple[list[int], str, int]
operations = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=12),
        st.sampled_from(["", "tenant"]),
        st.integers(0, 5),
    ),
    max_size=40,
)


@settings(max_examples=examples(80))
@given(operations, st.integers(1, 12), st.integers(1, 4))
def test_no_block_is_lost_or_shared_wrongly(steps: list[Operation], num_blocks: int, block_size: int) -> None:
    pool = BlockPool(num_blocks, block_size)
    held: list[list[int]] = []
    content: dict[int, tuple[str, tuple[int, ...]]] = {}
    for tokens, salt, leaves in steps:
        prefix = pool.find_prefix(tokens, salt)
        for index, block in enumerate(prefix):
            assert content[block] == (salt, tuple(tokens[: (index + 1) * block_size]))
        assert len(prefix) * block_size < len(tokens)
        if pool.can_allocate(pool.blocks_for(len(tokens)) - len(prefix), prefix):
            others = {block for blocks in held for block in blocks}
            blocks = admit(pool, tokens, salt)
            assert others.isdisjoint(blocks[len(prefix) :])
            held.append(blocks)
            for index in range(len(prefix), len(blocks)):
                content[blocks[index]] = (salt, tuple(tokens[: (index + 1) * block_size]))
        pool.check(held)
        if leaves < len(held):
            pool.release(held.pop(leaves))
        pool.check(held)
        assert pool.num_free + pool.num_cached + pool.num_used == num_blocks
    for blocks in held:
        pool.release(blocks)
    pool.check([])
    assert pool.num_used == 0

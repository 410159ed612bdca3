"""The block pool against a plain account of what each block holds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples

from engine.cache.block_pool import BlockPool, extend_keys


def keys_of(pool: BlockPool, tokens: list[int], salt: str = "") -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, len(tokens) // pool.block_size, tokens, pool.block_size, salt)
    return keys


def found(pool: BlockPool, tokens: list[int], salt: str = "") -> list[int]:
    """The blocks of the longest prefix that is indexed."""
    blocks = [pool.find(key) for key in keys_of(pool, tokens, salt)]
    return [block for block in blocks[: [*blocks, None].index(None)] if block is not None]


def register(pool: BlockPool, blocks: list[int], tokens: list[int], salt: str = "") -> None:
    for block, key in zip(blocks, keys_of(pool, tokens, salt), strict=False):
        pool.register(block, key)


def admit(pool: BlockPool, tokens: list[int], salt: str = "") -> list[int]:
    """Allocate, compute and register a sequence as a scheduler would."""
    prefix = found(pool, tokens, salt)
    blocks = pool.allocate(pool.blocks_for(len(tokens)) - len(prefix), prefix)
    register(pool, blocks, tokens, salt)
    return blocks


def test_a_released_prefix_is_found_again() -> None:
    pool = BlockPool(8, 2)
    blocks = admit(pool, [1, 2, 3, 4, 5])
    pool.release(blocks)
    assert found(pool, [1, 2, 3, 4, 9]) == blocks[:2]
    assert (pool.num_free, pool.num_cached, pool.num_used) == (6, 2, 0)
    pool.check([])


def test_only_registered_blocks_are_found() -> None:
    pool = BlockPool(8, 2)
    blocks = pool.allocate(2)
    register(pool, blocks, [1, 2])
    assert found(pool, [1, 2, 3, 4, 5]) == blocks[:1]


def test_salts_do_not_share() -> None:
    pool = BlockPool(8, 2)
    admit(pool, [1, 2, 3], "a")
    assert found(pool, [1, 2, 3], "b") == []
    assert found(pool, [1, 2, 3], "a") != []


def test_equal_hashes_do_not_share() -> None:
    # hash(-1) == hash(-2) in CPython, so these tokens collide in whatever is built on hash().
    assert hash((-1, 7)) == hash((-2, 7))
    pool = BlockPool(8, 2)
    admit(pool, [-1, 7, 3])
    assert found(pool, [-2, 7, 3]) == []


def test_the_same_tokens_behind_another_prefix_do_not_share() -> None:
    pool = BlockPool(8, 2)
    blocks = admit(pool, [1, 1, 2, 2, 3])
    assert found(pool, [2, 2, 3]) == []
    assert found(pool, [1, 1, 2, 2, 3]) == blocks[:2]


def test_what_follows_a_prefix_that_was_computed_twice_is_found() -> None:
    pool = BlockPool(8, 2)
    first, second = pool.allocate(1), pool.allocate(2)
    register(pool, first, [1, 1])
    register(pool, second, [1, 1, 2, 2])
    assert found(pool, [1, 1, 2, 2, 3]) == [first[0], second[1]]
    pool.release(second)
    assert (pool.num_cached, pool.num_free) == (1, 6)
    pool.check([first])


def test_a_prefix_behind_an_evicted_block_is_not_joined_to_its_successor() -> None:
    pool = BlockPool(3, 2)
    first = admit(pool, [1, 1, 2, 2])
    twin = pool.allocate(1)
    register(pool, twin, [1, 1])
    pool.release(first[:1])
    other = pool.allocate(1)
    assert other == first[:1]
    register(pool, other, [9, 9])
    assert found(pool, [9, 9, 2, 2, 3]) == other
    pool.check([first[1:], twin, other])


def test_the_tail_is_evicted_before_the_head() -> None:
    pool = BlockPool(3, 2)
    blocks = admit(pool, [1, 1, 2, 2, 3, 3])
    pool.release(blocks)
    pool.allocate(1)
    assert found(pool, [1, 1, 2, 2, 3, 3, 4]) == blocks[:2]


def test_the_least_recently_used_is_evicted_first() -> None:
    pool = BlockPool(2, 2)
    old, new = admit(pool, [1, 1]), admit(pool, [2, 2])
    pool.release(old)
    pool.release(new)
    pool.release(pool.allocate(0, old))
    assert pool.allocate(1) == new


def test_what_a_window_has_passed_is_reused_first_unless_it_was_found_again() -> None:
    pool = BlockPool(4, 2)
    old = admit(pool, [1, 1])
    passing = admit(pool, [2, 2, 3, 3, 4, 4])
    pool.release(old)
    pool.allocate(0, passing[:1])  # a second sequence begins with it
    pool.release(passing[:1])
    pool.release_passed(passing[:2])
    assert [pool.allocate(1)[0] for _ in range(3)] == [passing[1], old[0], passing[0]]


def test_a_key_stands_for_all_tokens_before_it() -> None:
    pool = BlockPool(1, 2)
    texts = [[1, 1, 2, 2], [1, 1, 2, 3], [3, 1, 2, 2], [258, 0, 2, 2], [2, 1, 2, 2]]
    keys = [keys_of(pool, text, salt)[1] for text in texts for salt in ("", "a")]
    assert len(set(keys)) == len(keys)
    again = keys_of(pool, texts[0])[:1]
    extend_keys(again, 2, texts[0], 2, "")
    assert again[1] == keys[0]


def test_asking_counts_the_cached_blocks_of_the_prefix() -> None:
    pool = BlockPool(3, 2)
    pool.release(admit(pool, [1, 1, 2, 2]))
    prefix = found(pool, [1, 1, 2, 2, 3])
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
        prefix = found(pool, tokens, salt)
        for index, block in enumerate(prefix):
            assert content[block] == (salt, tuple(tokens[: (index + 1) * block_size]))
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

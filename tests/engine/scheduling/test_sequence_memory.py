"""What sequences hold and begin with: snapshots where layers carry states, and only what windows see."""

from __future__ import annotations

from array import array

from engine.api.block_groups import Window
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.cache.block_pool import BlockPool
from engine.cache.state_slots import StateSlots
from engine.scheduling.sequence import ScheduledChunk, Sequence
from engine.scheduling.sequence_memory import SequenceMemory

BLOCK = 4


class Memory:
    """A ``SequenceMemory`` in blocks of 4, and who runs on it: with snapshots every 16 tokens, or with ``windows`` and
    up to 12 tokens at once."""

    def __init__(self, num_blocks: int = 64, snapshots: int = 8, windows: tuple[Window | None, ...] = ()) -> None:
        self.pools = [BlockPool(num_blocks, BLOCK, window) for window in windows or (None,)]
        self.pool = self.pools[0]
        self.slots = StateSlots(4, snapshots)
        if windows:
            self.memory = SequenceMemory(self.pools, most_launched=12)
        else:
            self.memory = SequenceMemory(self.pools, slots=self.slots, stride=16)
        self.running: list[Sequence] = []

    def start(self, tokens: list[int], *, repeated: int = 0, candidates: int = 1, salt: str = "") -> Sequence:
        request = Request("r", tuple(tokens), SamplingParams(1), candidates, salt, resume_points=(repeated,))
        sequence = Sequence(request, 0, list(tokens))
        assert self.memory.start(sequence, spare=0)
        self.running.append(sequence)
        self.memory.check(self.running)
        return sequence

    def prefill(self, sequence: Sequence, most: int = 1000) -> list[ScheduledChunk]:
        """Compute all known tokens, in chunks of up to ``most``."""
        chunks = []
        while sequence.num_computed < len(sequence.tokens):
            left = len(sequence.tokens) - sequence.num_computed
            chunks.append(self.memory.chunk(sequence, sequence.num_computed, min(most, left)))
            assert self.memory.extend(sequence, chunks[-1].start + chunks[-1].num_tokens)
            before, sequence.num_computed = sequence.num_computed, chunks[-1].start + chunks[-1].num_tokens
            self.memory.commit(chunks[-1], before)
            self.memory.check(self.running)
        return chunks

    def end(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.memory.release(sequence)
        self.memory.check(self.running)


def ends(chunks: list[ScheduledChunk]) -> list[tuple[int, bool]]:
    """Where each chunk ends, and whether a snapshot is taken there."""
    return [(chunk.start + chunk.num_tokens, chunk.snapshot is not None) for chunk in chunks]


def test_chunks_end_where_snapshots_are_taken() -> None:
    memory = Memory()
    sequence = memory.start(list(range(42)), repeated=39)
    assert ends(memory.prefill(sequence)) == [(16, True), (32, True), (36, True), (42, False)]
    memory.end(sequence)
    again = memory.start(list(range(42)), repeated=39)
    assert ends(memory.prefill(again, most=10)) == [(42, False)]


def test_a_sequence_begins_at_the_last_snapshot_of_its_prefix() -> None:
    memory = Memory()
    first = memory.start(list(range(42)), repeated=39)
    memory.prefill(first)
    memory.end(first)
    next_turn = memory.start([*range(39), 100, 101, 102, 103])
    assert next_turn.num_computed == 36
    assert (next_turn.state_start, next_turn.state_source) == (
        36,
        memory.slots.find(next_turn.block_keys[8]),
    )
    other = memory.start([*range(30), *range(200, 230)])
    assert (other.num_computed, other.state_start) == (16, 16)


def test_blocks_without_a_snapshot_are_not_used() -> None:
    memory = Memory(snapshots=0)
    first = memory.start(list(range(42)))
    assert ends(memory.prefill(first)) == [(42, False)]
    memory.end(first)
    assert memory.start(list(range(42))).num_computed == 0


def test_tenants_share_no_snapshot() -> None:
    memory = Memory()
    first = memory.start(list(range(42)), salt="one")
    memory.prefill(first)
    memory.end(first)
    assert memory.start(list(range(42)), salt="two").num_computed == 0
    assert memory.start(list(range(42)), salt="one").num_computed == 32


def test_candidates_begin_at_the_end_of_their_prompt() -> None:
    memory = Memory()
    first = memory.start(list(range(13)), candidates=2)
    assert ends(memory.prefill(first)) == [(12, True), (13, False)]
    assert memory.start(list(range(13)), candidates=2).num_computed == 12


def test_a_snapshot_is_taken_while_decoding() -> None:
    memory = Memory()
    sequence = memory.start(list(range(14)))
    memory.prefill(sequence)
    taken = []
    for token in range(14, 18):
        sequence.tokens.append(token)
        assert memory.memory.extend(sequence, token + 1)
        taken += ends(memory.prefill(sequence))
    assert taken == [(15, False), (16, True), (17, False), (18, False)]


def test_a_snapshot_goes_with_its_block() -> None:
    memory = Memory(num_blocks=10)
    first = memory.start(list(range(20)))
    memory.prefill(first)
    memory.end(first)
    assert memory.slots.num_kept == 1
    other = memory.start(list(range(100, 140)))
    memory.prefill(other)
    assert list(memory.slots.keys) == [
        other.block_keys[3],
        other.block_keys[7],
    ]


def test_what_is_not_committed_keeps_nothing() -> None:
    memory = Memory(snapshots=1)
    sequence = memory.start(list(range(20)))
    chunk = memory.memory.chunk(sequence, 0, 20)
    assert chunk.snapshot is not None
    again = memory.memory.chunk(sequence, 0, 20)
    assert again == chunk
    memory.end(sequence)
    assert memory.slots.num_kept == 0
    assert memory.slots.reserve() == chunk.snapshot


# --- Windows -------------------------------------------------------------------------------------

BOTH = (None, Window(8))


def test_a_window_holds_no_more_than_itself_and_what_is_computed() -> None:
    memory = Memory(windows=(None, Window(8), Window(16, chunked=True)))
    sequence = memory.start(list(range(100)))
    most = [0, 0, 0]
    while sequence.num_computed < 140:
        if sequence.num_computed == len(sequence.tokens):
            sequence.tokens.append(len(sequence.tokens))
        left = len(sequence.tokens) - sequence.num_computed
        chunk = memory.memory.chunk(sequence, sequence.num_computed, min(50, left))
        assert chunk.num_tokens <= 12
        assert memory.memory.extend(sequence, chunk.start + chunk.num_tokens)
        before, sequence.num_computed = sequence.num_computed, chunk.start + chunk.num_tokens
        memory.memory.commit(chunk, before)
        memory.memory.check(memory.running)
        most = [max(each, pool.num_used) for each, pool in zip(most, memory.pools, strict=True)]
    assert most == [35, (8 + 12) // BLOCK + 1, (16 + 12) // BLOCK + 1]
    # While it decodes, only the window is left.
    assert [pool.num_used for pool in memory.pools] == [35, 8 // BLOCK + 1, (140 - 128) // BLOCK]
    memory.end(sequence)
    assert [pool.num_used for pool in memory.pools] == [0, 0, 0]


def test_a_prefix_needs_only_what_the_window_sees_behind_it() -> None:
    memory = Memory(windows=BOTH)
    first = memory.start(list(range(40)))
    memory.prefill(first)
    memory.end(first)
    windowed = memory.pools[1]
    for key in first.block_keys[:7]:
        _forget(windowed, key)
    second = memory.start(list(range(40)))
    assert second.num_computed == 36
    assert second.passed == [0, 7]
    assert second.tables[1][7:9] == first_blocks(windowed, first.block_keys[7:9])
    memory.end(second)
    _forget(windowed, first.block_keys[8])
    assert memory.start(list(range(40))).num_computed == 0, "the last window before any other end is not there"


def test_a_prefix_ends_where_a_group_without_a_window_ends() -> None:
    memory = Memory(windows=BOTH)
    first = memory.start(list(range(40)))
    memory.prefill(first)
    memory.end(first)
    _forget(memory.pools[0], first.block_keys[5])
    assert memory.start(list(range(40))).num_computed == 20


def test_what_the_end_of_a_prompt_sees_outlives_what_was_passed_before() -> None:
    """A long answer, and a pool that is nearly used up: the next turn still begins at the end of the prompt."""
    memory = Memory(num_blocks=40, windows=(Window(8),))
    sequence = memory.start(list(range(100)))
    memory.prefill(sequence)
    for token in range(100, 150):
        sequence.tokens.append(token)
        memory.prefill(sequence)
    memory.end(sequence)
    other = memory.start(list(range(1000, 1060)))
    memory.prefill(other)
    memory.end(other)
    assert memory.start([*range(100), 7, 8, 9]).num_computed == 100


def _forget(pool: BlockPool, key: bytes) -> None:
    """Have the content be evicted, and no other."""
    block = pool.find(key)
    assert block is not None
    pool.allocate(0, [block])
    pool.release_passed([block])
    pool._cached.move_to_end(block, last=False)
    free = pool.allocate(pool.num_free + 1)
    assert pool.find(key) is None
    pool.release(free)


def first_blocks(pool: BlockPool, keys: list[bytes]) -> array[int]:
    return array("i", [block for key in keys if (block := pool.find(key)) is not None])

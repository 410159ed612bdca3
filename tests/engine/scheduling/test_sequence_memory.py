"""What sequences begin with where layers carry states: the last snapshot before their first new token."""

from __future__ import annotations

from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.cache.block_pool import BlockPool
from engine.cache.state_slots import StateSlots
from engine.scheduling.sequence import ScheduledChunk, Sequence
from engine.scheduling.sequence_memory import SequenceMemory

BLOCK = 4


class Memory:
    """A ``SequenceMemory`` with strides of 16 tokens in blocks of 4, and who runs on it."""

    def __init__(self, num_blocks: int = 64, snapshots: int = 8) -> None:
        self.pool = BlockPool(num_blocks, BLOCK)
        self.slots = StateSlots(4, snapshots)
        self.memory = SequenceMemory(self.pool, self.slots, stride=16)
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
        memory.slots.find(memory.pool.identity(next_turn.blocks[8])),
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
        assert memory.memory.has_room(sequence, token + 1) or memory.memory.grow(sequence)
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
    assert list(memory.slots.identities) == [
        memory.pool.identity(other.blocks[3]),
        memory.pool.identity(other.blocks[7]),
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

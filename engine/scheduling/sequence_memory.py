"""What a sequence holds while it runs: blocks of keys and values, and where layers carry states, a slot. No torch."""

from __future__ import annotations

from collections.abc import Collection

from engine.cache.block_pool import BlockPool
from engine.cache.state_slots import StateSlots
from engine.scheduling.sequence import ScheduledChunk, Sequence


class SequenceMemory:
    """Gives sequences their blocks and slots, and finds what the prefix cache holds of their tokens already.

    With ``slots`` a prefix can only be used up to a block whose end has a snapshot. Snapshots are taken where a later
    sequence is likely to begin: every ``stride`` tokens (a multiple of the block size), at the end of what the next
    turn of a conversation repeats, and for several candidates at the end of their prompt. A chunk ends there. Each
    running sequence has a slot of its own, and as many may run as there are slots, so these are never waited for.

    An ``original_context`` above 0 is the number of tokens beyond which all tokens of a sequence have other keys. What
    was computed before is worth nothing then: ``has_outgrown`` says of which sequence.
    """

    def __init__(
        self, pool: BlockPool, slots: StateSlots | None = None, stride: int = 0, original_context: int = 0
    ) -> None:
        self._pool = pool
        self.original_context = original_context
        self._slots = slots
        self._stride = stride
        # Slots for snapshots of chunks that are scheduled and not committed, by the number of tokens at their end.
        self._reserved: dict[Sequence, dict[int, int]] = {}
        if slots is not None:
            assert stride > 0, "snapshots need a stride"
            assert stride % pool.block_size == 0, "a snapshot is taken at the end of a block"
            pool.on_forgotten = slots.forget

    @property
    def has_states(self) -> bool:
        return self._slots is not None

    @property
    def num_available(self) -> int:
        """Blocks that could be handed out now."""
        return self._pool.num_available

    def start(self, sequence: Sequence, spare: int) -> bool:
        """Give a sequence all that its known tokens need, if ``spare`` blocks are left then; finds its prefix."""
        sequence.is_long = 0 < self.original_context < len(sequence.tokens)
        prefix = self._pool.find_prefix(sequence.tokens, sequence.salt)
        source = None
        while prefix and self._slots is not None:
            source = self._slots.find(self._pool.identity(prefix[-1]))
            if source is not None:
                break
            prefix.pop()
        missing = self._pool.blocks_for(len(sequence.tokens)) - len(prefix)
        if not self._pool.can_allocate(missing + spare, prefix):
            return False
        sequence.blocks.extend(self._pool.allocate(missing, prefix))
        sequence.num_computed = sequence.num_launched = len(prefix) * self._pool.block_size
        if self._slots is not None:
            sequence.state_slot = self._slots.take()
            sequence.state_start, sequence.state_source = sequence.num_computed, source
            sequence.has_lost_states = False
        return True

    def has_outgrown(self, sequence: Sequence) -> bool:
        """Whether a running sequence was begun within the original context and has more tokens, known or unread."""
        return 0 < self.original_context < sequence.num_known and not sequence.is_long

    def is_at_its_prompt(self, sequence: Sequence) -> bool:
        """Whether a block of its prompt that another candidate could share is still to be computed."""
        return sequence.num_prompt - sequence.num_computed > self._pool.block_size

    def has_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether its blocks hold ``num_tokens`` tokens."""
        return num_tokens <= len(sequence.blocks) * self._pool.block_size

    def grow(self, sequence: Sequence) -> bool:
        """Give a sequence its next block, if there is one."""
        if not self._pool.can_allocate(1):
            return False
        sequence.blocks.extend(self._pool.allocate(1))
        return True

    def release(self, sequence: Sequence) -> None:
        """Take back all that a sequence holds; its full blocks and snapshots can be found until they are reused."""
        self._pool.release(sequence.blocks)
        del sequence.blocks[:]
        if self._slots is not None:
            self._slots.give_back(sequence.state_slot)
            for slot in self._reserved.pop(sequence, {}).values():
                self._slots.drop(slot)

    def chunk(self, sequence: Sequence, start: int, most: int) -> ScheduledChunk:
        """The next chunk of a sequence: up to ``most`` tokens from ``start`` on, or to where a snapshot is taken."""
        if self._slots is None or not self._slots.num_snapshots:
            return ScheduledChunk(sequence, start, most)
        stop = self._next_snapshot(sequence, start)
        if stop > start + most:
            return ScheduledChunk(sequence, start, most)
        reserved = self._reserved.setdefault(sequence, {})
        if stop not in reserved and (slot := self._slots.reserve()) is not None:
            reserved[stop] = slot
        return ScheduledChunk(sequence, start, stop - start, reserved.get(stop))

    def commit(self, chunk: ScheduledChunk, before: int) -> None:
        """Index the blocks that a sequence with ``before`` computed tokens has filled by ``chunk``."""
        sequence, size = chunk.sequence, self._pool.block_size
        stop = chunk.start + chunk.num_tokens
        for index in range(before // size, stop // size):
            self._pool.register(sequence.blocks, index, sequence.tokens, sequence.salt)
        if self._slots is None or chunk.snapshot is None:
            return
        reserved = self._reserved[sequence]
        del reserved[stop]
        if not reserved:
            del self._reserved[sequence]
        identity = self._pool.identity(sequence.blocks[stop // size - 1])
        if self._pool.is_indexed(identity):
            self._slots.keep(identity, chunk.snapshot)
        else:
            self._slots.drop(chunk.snapshot)

    def check(self, running: Collection[Sequence]) -> None:
        """Assert that nothing is lost or held twice, given all sequences that hold anything."""
        self._pool.check(sequence.blocks for sequence in running)
        if self._slots is not None:
            reserved = [slot for slots in self._reserved.values() for slot in slots.values()]
            self._slots.check([sequence.state_slot for sequence in running], reserved)
            assert all(map(self._pool.is_indexed, self._slots.identities)), "a snapshot outlived its block"
            assert self._reserved.keys() <= set(running), "a snapshot is reserved by a sequence that ended"

    def _next_snapshot(self, sequence: Sequence, start: int) -> int:
        size, request = self._pool.block_size, sequence.request
        ends = [(start // self._stride + 1) * self._stride, *(point // size * size for point in request.resume_points)]
        if request.candidates > 1:
            # All candidates compute the prompt's last token, for its logits.
            ends.append((len(request.prompt) - 1) // size * size)
        return min(end for end in ends if end > start)

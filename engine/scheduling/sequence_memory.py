"""What a sequence holds while it runs: blocks of keys and values, and where layers carry states, a slot. No torch."""

from __future__ import annotations

from array import array
from collections.abc import Collection
from collections.abc import Sequence as Several
from itertools import accumulate, repeat

from engine.cache.block_pool import BlockPool, extend_keys
from engine.cache.state_slots import StateSlots
from engine.scheduling.sequence import ScheduledChunk, Sequence

# A later turn seldom repeats the very end of a prompt, which asks for the answer: so many tokens before it, it does.
_ASKING = 64


class SequenceMemory:
    """Gives sequences their blocks and slots, and finds what the prefix cache holds of their tokens already.

    Each layer group has a pool of blocks. In one whose layers see everything, a sequence holds the blocks of all its
    tokens. In one with a window it holds those that the window still sees from the last computed token, and after them
    those of what is launched: ``most_launched`` tokens at once. What the window has passed is given back. A prefix is
    found where all its blocks are there in the groups without a window, and in the others those that the first token
    after it sees.

    With ``slots`` a prefix can only be used up to a block whose end has a snapshot. Snapshots are taken where a later
    sequence is likely to begin: every ``stride`` tokens (a multiple of the block size), at the end of what the next
    turn of a conversation repeats, and for several candidates at the end of their prompt. A chunk ends there. Each
    running sequence has a slot of its own, and as many may run as there are slots, so these are never waited for.

    An ``original_context`` above 0 is the number of tokens beyond which all tokens of a sequence have other keys. What
    was computed before is worth nothing then: ``has_outgrown`` says of which sequence.
    """

    def __init__(
        self,
        pools: Several[BlockPool],
        most_launched: int = 0,
        slots: StateSlots | None = None,
        stride: int = 0,
        original_context: int = 0,
    ) -> None:
        self.original_context = original_context
        self._pools = pools
        self._size = pools[0].block_size
        self._most_launched = most_launched
        self._has_windows = any(pool.window is not None for pool in pools)
        self._slots = slots
        self._stride = stride
        # Slots for snapshots of chunks that are scheduled and not committed, by the number of tokens at their end.
        self._reserved: dict[Sequence, dict[int, int]] = {}
        if slots is not None:
            assert all(pool.window is None for pool in pools), "states are computed again over blocks of all tokens"
            assert stride > 0, "snapshots need a stride"
            assert stride % self._size == 0, "a snapshot is taken at the end of a block"
            pools[0].on_forgotten = slots.forget

    @property
    def has_states(self) -> bool:
        return self._slots is not None

    @property
    def num_available(self) -> tuple[int, ...]:
        """Blocks of each group that could be handed out now."""
        return tuple(pool.num_available for pool in self._pools)

    def start(self, sequence: Sequence, spare: int) -> bool:
        """Give a sequence what its known tokens need, if ``spare`` blocks of each group are left then; finds its
        prefix."""
        is_long = 0 < self.original_context < len(sequence.tokens)
        if is_long != sequence.is_long:
            sequence.is_long = is_long
            sequence.block_keys.clear()
        # Never all of its tokens: the logits of the last one are always needed.
        keys, count = sequence.block_keys, (len(sequence.tokens) - 1) // self._size
        self._extend_keys(sequence, count)
        found, source = self._find_prefix(keys[:count])
        position, taken = found * self._size, []
        for group, pool in enumerate(self._pools):
            first = pool.first_block(position)
            prefix = [block for key in keys[first:found] if (block := pool.find(key)) is not None]
            missing = self._table_end(group, first, len(sequence.tokens)) - found
            if not pool.can_allocate(missing + spare, prefix):
                return False
            taken.append((first, missing, prefix))
        sequence.other_tables = tuple(array("i") for _ in self._pools[1:])
        for (first, missing, prefix), pool, table in zip(taken, self._pools, sequence.tables, strict=True):
            table.extend(repeat(0, first))
            table.extend(pool.allocate(missing, prefix))
        sequence.passed = [first for first, _, _ in taken]
        sequence.reach = min(map(len, sequence.tables)) * self._size
        sequence.num_computed = sequence.num_launched = position
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
        return sequence.num_prompt - sequence.num_computed > self._size

    def extend(self, sequence: Sequence, stop: int) -> bool:
        """Have a running sequence hold the blocks of its tokens up to ``stop``; False where a group has none left.

        What windows have passed is given back on the way.
        """
        if stop <= sequence.reach:
            return True
        for group, table in enumerate(sequence.tables):
            if stop <= len(table) * self._size:
                continue
            pool = self._pools[group]
            self._pass(sequence, group)
            missing = self._table_end(group, sequence.passed[group], max(stop, len(sequence.tokens))) - len(table)
            if not pool.can_allocate(missing):
                return False
            table.extend(pool.allocate(missing))
        sequence.reach = min(map(len, sequence.tables)) * self._size
        return True

    def release(self, sequence: Sequence) -> None:
        """Take back all that a sequence holds; its full blocks and snapshots can be found until they are reused."""
        for pool, table, first in zip(self._pools, sequence.tables, sequence.passed, strict=True):
            pool.release(table[first:])
            del table[:]
        sequence.passed, sequence.reach = [0] * len(self._pools), 0
        if self._slots is not None:
            self._slots.give_back(sequence.state_slot)
            for slot in self._reserved.pop(sequence, {}).values():
                self._slots.drop(slot)

    def chunk(self, sequence: Sequence, start: int, most: int) -> ScheduledChunk:
        """The next chunk of a sequence: up to ``most`` tokens from ``start`` on, or to where a snapshot is taken.

        ``extend`` follows, with its end.
        """
        if self._has_windows:
            most = min(most, sequence.num_computed + self._most_launched - start)
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
        sequence, size = chunk.sequence, self._size
        begin, stop = before // size, (chunk.start + chunk.num_tokens) // size
        if begin == stop:
            return  # most decodes fill no block
        self._extend_keys(sequence, stop)
        keys = sequence.block_keys
        for pool, table in zip(self._pools, sequence.tables, strict=True):
            for index in range(begin, stop):
                pool.register(table[index], keys[index])
        if self._slots is None or chunk.snapshot is None:
            return
        reserved = self._reserved[sequence]
        del reserved[stop * size]
        if not reserved:
            del self._reserved[sequence]
        if self._pools[0].find(keys[stop - 1]) is not None:
            self._slots.keep(keys[stop - 1], chunk.snapshot)
        else:
            self._slots.drop(chunk.snapshot)

    def check(self, running: Collection[Sequence]) -> None:
        """Assert that nothing is lost or held twice, given all sequences that hold anything."""
        for group, pool in enumerate(self._pools):
            held = [sequence.tables[group][sequence.passed[group] :] for sequence in running]
            pool.check(held)
            most = pool.most_held(self._most_launched)
            assert most is None or max(map(len, held), default=0) <= most, "a sequence holds what its window has passed"
        if self._slots is not None:
            reserved = [slot for slots in self._reserved.values() for slot in slots.values()]
            self._slots.check([sequence.state_slot for sequence in running], reserved)
            found = map(self._pools[0].find, self._slots.keys)
            assert all(block is not None for block in found), "a snapshot outlived its block"
            assert self._reserved.keys() <= set(running), "a snapshot is reserved by a sequence that ended"

    def _extend_keys(self, sequence: Sequence, count: int) -> None:
        salt, is_long = sequence.request.salt, sequence.is_long
        extend_keys(sequence.block_keys, count, sequence.tokens, self._size, salt, is_long=is_long)

    def _find_prefix(self, keys: Several[bytes]) -> tuple[int, int | None]:
        """How many of the blocks with these keys need not be computed, and the slot of the states after them."""
        whole = [pool for pool in self._pools if pool.window is None]
        there = (all(pool.find(key) is not None for pool in whole) for key in keys)
        most = next((index for index, found in enumerate(there) if not found), len(keys))
        usable: Several[int] = range(most, 0, -1)
        for pool in self._pools:
            if pool.window is not None:
                missing = (-1 if pool.find(key) is not None else index for index, key in enumerate(keys[:most]))
                last_missing = list(accumulate(missing, max))
                usable = [n for n in usable if last_missing[n - 1] < pool.first_block(n * self._size)]
        if self._slots is None:
            return next(iter(usable), 0), None
        for count in usable:
            if (source := self._slots.find(keys[count - 1])) is not None:
                return count, source
        return 0, None

    def _table_end(self, group: int, first: int, known: int) -> int:
        """Where the table of a sequence with ``known`` tokens ends, which holds blocks from ``first`` on."""
        pool = self._pools[group]
        most = pool.most_held(self._most_launched)
        return pool.blocks_for(known) if most is None else min(pool.blocks_for(known), first + most)

    def _pass(self, sequence: Sequence, group: int) -> None:
        """Give back what the window of a group sees no longer."""
        pool, table = self._pools[group], sequence.tables[group]
        first = pool.first_block(sequence.num_computed)
        prompt = sequence.num_prompt
        near_end = range(pool.first_block(max(0, prompt - _ASKING)), pool.blocks_for(prompt))
        for index in range(sequence.passed[group], first):
            # The next turn of a conversation begins near the end of the prompt: what it sees there stays longer.
            give_back = pool.release if index in near_end else pool.release_passed
            give_back(table[index : index + 1])
        sequence.passed[group] = first

    def _next_snapshot(self, sequence: Sequence, start: int) -> int:
        size, request = self._size, sequence.request
        ends = [(start // self._stride + 1) * self._stride, *(point // size * size for point in request.resume_points)]
        if request.candidates > 1:
            # All candidates compute the prompt's last token, for its logits.
            ends.append((len(request.prompt) - 1) // size * size)
        return min(end for end in ends if end > start)

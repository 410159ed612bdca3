"""Decides what runs next: decodes, then prefill within the budget; preempts the youngest. Policy only, no torch."""

from __future__ import annotations

from collections import OrderedDict
from operator import gt

from engine.scheduling.chunk_budget import StepPacer
from engine.scheduling.sequence import ScheduledChunk, Sequence
from engine.scheduling.sequence_memory import SequenceMemory


class Scheduler:
    """Decides what each step computes and moves sequences between three places.

    - waiting: first come, first served; preempted sequences return to the front;
    - running: in order of admission; holds the memory of all its known tokens or, in layer groups with a window, of as
      many as are ever held at once, so that a prefill seldom waits for it;
    - parked: other candidates of a prompt that candidate 0 is still computing; they will find it in the prefix cache.

    A step may be scheduled while the one before it is in flight: it then begins after what that one computes. A
    sequence whose last token has to be read first is left out. One whose states were advanced by something that was
    discarded is preempted, and computed again from the last snapshot of them.

    When a sequence finds a pool dry, the youngest running one gives its blocks back and is computed again later.
    Nothing can deadlock: the oldest one takes from all others until it advances, and alone it fits, because the pool of
    each layer group has as many blocks as one sequence of the longest context ever holds there, and what no sequence
    holds can be handed out. It ends after finitely many steps, and then another one is the oldest.

    A sequence that outgrows the original context, where there is one, is computed again from its first token on: once,
    and without losing its place. Of several candidates one goes first, so that the others find the prompt.
    """

    def __init__(self, memory: SequenceMemory, pacer: StepPacer, max_running: int) -> None:
        self.preemptions = 0
        self._memory = memory
        self._pacer = pacer
        self._max_running = max_running
        self._waiting: OrderedDict[Sequence, None] = OrderedDict()
        self._running: dict[Sequence, None] = {}
        self._parked: dict[str, dict[Sequence, None]] = {}
        self._preempted: set[Sequence] = set()
        self._blocked_head: tuple[Sequence, tuple[int, ...]] | None = None

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + sum(map(len, self._parked.values()))

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def add(self, candidates: list[Sequence]) -> None:
        """Queue the candidates of one request, candidate 0 first."""
        first, *siblings = candidates
        self._waiting[first] = None
        if siblings:
            self._parked[first.request.id] = dict.fromkeys(siblings)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended, wherever it is; its full blocks stay indexed until they are reused."""
        if sequence in self._running:
            del self._running[sequence]
            self._release(sequence)
        elif sequence in self._waiting:
            del self._waiting[sequence]
        else:
            siblings = self._parked[sequence.request.id]
            del siblings[sequence]
            if not siblings:
                del self._parked[sequence.request.id]
        self._preempted.discard(sequence)
        if sequence.candidate == 0:
            self._admit_siblings(sequence.request.id)
        if self._blocked_head and self._blocked_head[0] is sequence:
            self._blocked_head = None

    def schedule(self) -> list[ScheduledChunk]:
        """The chunks of the next step, blocks allocated; empty if nothing can run before a token is read."""
        if self._memory.has_states:
            for sequence in [one for one in reversed(self._running) if one.has_lost_states]:
                self._preempt(sequence)
        if self._memory.original_context:
            self._begin_outgrown_again()
        batch, num_unread = self._decodes()
        num_prompts = self.num_running + self.num_waiting - len(batch) - num_unread
        budget = self._pacer.prefill_budget(len(batch), num_prompts)
        for sequence in list(self._running):
            if budget <= 0:
                break
            if sequence in self._running and sequence.num_known - sequence.num_launched > 1:
                budget -= self._add_chunk(batch, sequence, budget)
        while budget > 0 and self._waiting and len(self._running) < self._max_running:
            sequence = next(iter(self._waiting))
            if not self._start(sequence):
                break
            budget -= self._add_chunk(batch, sequence, budget)
        return batch

    def commit(self, chunk: ScheduledChunk) -> None:
        """Record that a chunk is computed: index its full blocks, and admit siblings that waited for the prompt."""
        sequence = chunk.sequence
        before = sequence.num_computed
        sequence.num_computed = chunk.start + chunk.num_tokens
        sequence.num_launched = max(sequence.num_launched, sequence.num_computed)
        self._memory.commit(chunk, before)
        if self._parked and sequence.candidate == 0 and sequence.num_computed >= sequence.num_prompt:
            self._admit_siblings(sequence.request.id)

    def check(self) -> None:
        """Assert that pool and sequences agree and that no sequence is in two places."""
        self._memory.check(self._running)
        parked = [sequence for siblings in self._parked.values() for sequence in siblings]
        assert not any(sequence.blocks for sequence in [*self._waiting, *parked]), "a waiting sequence holds blocks"
        known = {*self._running, *self._waiting, *parked}
        assert len(known) == self.num_running + self.num_waiting, "a sequence is in two places"
        assert known.issuperset(self._preempted), "a sequence that ended is remembered"
        assert self._blocked_head is None or self._blocked_head[0] in known, "a sequence that ended is remembered"

    def _decodes(self) -> tuple[list[ScheduledChunk], int]:
        """The decodes of the next step, and how many sequences are left out because their last token is not read, or
        because they begin again once another candidate has computed their prompt."""
        batch: list[ScheduledChunk] = []
        left_out, may_outgrow = 0, self._memory.original_context > 0
        for sequence in list(self._running):
            start = sequence.num_launched
            if len(sequence.tokens) + sequence.num_unread - start != 1 or sequence not in self._running:
                continue  # still in prefill, or preempted for one before it
            if (sequence.num_unread and not sequence.runs_ahead) or (
                may_outgrow and self._memory.has_outgrown(sequence)
            ):
                left_out += 1
            elif start < sequence.reach or self._make_room(batch, sequence, start + 1):
                batch.append(self._memory.chunk(sequence, start, 1))
        return batch, left_out

    def _start(self, sequence: Sequence) -> bool:
        """Move the first waiting sequence to the running ones, if the pool has room for it."""
        available = self._memory.num_available
        # Looking up a long prompt is not free: a head of the queue that found no room is retried only if there is more.
        before = self._blocked_head[1] if self._blocked_head and self._blocked_head[0] is sequence else None
        if before and not any(map(gt, available, before)):
            return False
        # One spare block for each running sequence, or the newcomer would soon be preempted for them; this also keeps
        # out one that was preempted in this very step.
        if not self._memory.start(sequence, spare=len(self._running)):
            self._blocked_head = sequence, available
            return False
        self._blocked_head = None
        del self._waiting[sequence]
        self._running[sequence] = None
        if sequence not in self._preempted:
            sequence.num_cached_tokens = sequence.num_computed
        return True

    def _make_room(self, batch: list[ScheduledChunk], sequence: Sequence, stop: int) -> bool:
        """Have a sequence hold the blocks of its tokens up to ``stop``, preempting the youngest if need be.

        False if it is itself preempted. Chunks of ``batch`` whose sequence is preempted are left out of it.
        """
        while not self._memory.extend(sequence, stop):
            assert len(self._running) > 1, "the pools cannot hold one sequence"
            youngest = next(reversed(self._running))
            self._preempt(youngest)
            if youngest is sequence:
                return False
            batch[:] = [chunk for chunk in batch if chunk.sequence is not youngest]
        return True

    def _begin_outgrown_again(self) -> None:
        first = {one.request.id for one in self._running if one.is_long and self._memory.is_at_its_prompt(one)}
        for sequence in [one for one in self._running if not one.num_unread and self._memory.has_outgrown(one)]:
            if sequence.request.id in first or sequence not in self._running:
                continue  # it will find the prompt, or was preempted for one before it
            self._release(sequence)
            if self._start_in_place(sequence) and self._memory.is_at_its_prompt(sequence):
                first.add(sequence.request.id)

    def _start_in_place(self, sequence: Sequence) -> bool:
        """Give a running sequence that holds nothing what it needs, preempting the youngest if need be; False if it has
        to wait itself."""
        while not self._memory.start(sequence, spare=0):
            youngest = next(reversed(self._running))
            if youngest is sequence:
                self._put_back(sequence)
                return False
            self._preempt(youngest)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self._put_back(sequence)

    def _put_back(self, sequence: Sequence) -> None:
        del self._running[sequence]
        self._preempted.add(sequence)
        self._queue_first(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self._memory.release(sequence)
        sequence.num_computed = 0
        sequence.rewind()

    def _queue_first(self, sequence: Sequence) -> None:
        self._waiting[sequence] = None
        self._waiting.move_to_end(sequence, last=False)

    def _admit_siblings(self, request_id: str) -> None:
        for sibling in reversed(self._parked.pop(request_id, {})):
            self._queue_first(sibling)

    def _add_chunk(self, batch: list[ScheduledChunk], sequence: Sequence, budget: int) -> int:
        start = sequence.num_launched
        chunk = self._memory.chunk(sequence, start, min(budget, len(sequence.tokens) - start))
        if not self._make_room(batch, sequence, start + chunk.num_tokens):
            return 0
        batch.append(chunk)
        return chunk.num_tokens

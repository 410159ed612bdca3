"""Who runs next, and that nobody waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples

from engine.api.block_groups import Window
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.cache.block_pool import BlockPool
from engine.scheduling.chunk_budget import FIRST_CHUNKS, FittedCost, StepPacer
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import ScheduledChunk, Sequence
from engine.scheduling.sequence_memory import SequenceMemory

FIRST_CHUNK = FIRST_CHUNKS[0]


def make_scheduler(
    num_blocks: int = 100, block_size: int = 4, max_running: int = 8, original_context: int = 0
) -> tuple[Scheduler, BlockPool]:
    pool = BlockPool(num_blocks, block_size)
    memory = SequenceMemory([pool], original_context=original_context)
    return Scheduler(memory, StepPacer(150, FittedCost()), max_running), pool


def make_sequences(name: str, prompt: list[int], candidates: int = 1) -> list[Sequence]:
    request = Request(name, tuple(prompt), SamplingParams(max_tokens=100), candidates)
    return [Sequence(request, candidate, list(prompt)) for candidate in range(candidates)]


def add(scheduler: Scheduler, name: str, length: int, candidates: int = 1) -> list[Sequence]:
    start = sum(map(ord, name)) * 1000
    sequences = make_sequences(name, list(range(start, start + length)), candidates)
    scheduler.add(sequences)
    return sequences


def run(scheduler: Scheduler) -> list[ScheduledChunk]:
    """One step: everything is computed, and what samples gains a token."""
    batch = scheduler.schedule()
    for work in batch:
        samples = work.samples
        scheduler.commit(work)
        if samples:
            work.sequence.tokens.append(len(work.sequence.tokens))
    scheduler.check()
    return batch


def names(batch: list[ScheduledChunk]) -> list[tuple[str, int, int]]:
    return [(work.sequence.request.id, work.start, work.num_tokens) for work in batch]


def test_nothing_to_do() -> None:
    scheduler, _ = make_scheduler()
    assert scheduler.schedule() == []


def test_decodes_come_first_and_prefill_fills_the_budget() -> None:
    scheduler, _ = make_scheduler()
    add(scheduler, "a", 5)
    assert names(run(scheduler)) == [("a", 0, 5)]
    add(scheduler, "b", FIRST_CHUNK + 8)
    add(scheduler, "c", 5)
    assert names(run(scheduler)) == [("a", 5, 1), ("b", 0, FIRST_CHUNK)]
    assert names(run(scheduler)) == [("a", 6, 1), ("b", FIRST_CHUNK, 8), ("c", 0, 5)]
    assert names(run(scheduler)) == [("a", 7, 1), ("b", FIRST_CHUNK + 8, 1), ("c", 5, 1)]


def test_no_more_than_max_running() -> None:
    scheduler, _ = make_scheduler(max_running=2)
    first, *_ = [add(scheduler, name, 3)[0] for name in "abc"]
    run(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    scheduler.remove(first)
    assert names(run(scheduler)) == [("b", 3, 1), ("c", 0, 3)]


def test_siblings_wait_for_the_prompt_and_share_its_blocks() -> None:
    scheduler, pool = make_scheduler()
    first, *siblings = add(scheduler, "a", FIRST_CHUNK + 9, candidates=3)
    add(scheduler, "b", 3)
    assert names(run(scheduler)) == [("a", 0, FIRST_CHUNK)]
    assert names(run(scheduler)) == [("a", FIRST_CHUNK, 9), ("b", 0, 3)]
    batch = run(scheduler)
    assert [work.sequence for work in batch[2:]] == siblings
    assert all(sibling.blocks[:10] == first.blocks[:10] for sibling in siblings)
    assert [sibling.num_cached_tokens for sibling in siblings] == [40, 40]
    assert pool.num_used == 11 + 2 + 1


def test_siblings_come_when_candidate_0_is_gone() -> None:
    scheduler, _ = make_scheduler()
    first, second = add(scheduler, "a", FIRST_CHUNK + 9, candidates=2)
    run(scheduler)
    scheduler.remove(first)
    assert [work.sequence for work in run(scheduler)] == [second]


def test_a_parked_sibling_can_be_removed() -> None:
    scheduler, pool = make_scheduler()
    for sequence in reversed(add(scheduler, "a", 50, candidates=3)):
        scheduler.remove(sequence)
    scheduler.check()
    assert (scheduler.num_waiting, pool.num_used) == (0, 0)


def test_the_youngest_gives_way_and_keeps_its_tokens() -> None:
    scheduler, _ = make_scheduler(num_blocks=5)
    old, young = add(scheduler, "a", 7)[0], add(scheduler, "b", 3)[0]
    run(scheduler)
    add(scheduler, "c", 3)
    while not scheduler.preemptions:
        run(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)
    assert (young.num_computed, len(young.blocks)) == (0, 0)
    sampled = list(young.sampled)
    assert sampled
    scheduler.remove(old)
    assert run(scheduler)[0].sequence is young
    assert young.sampled[: len(sampled)] == sampled


def test_cached_tokens_of_a_preempted_sequence_are_those_of_its_first_admission() -> None:
    scheduler, _ = make_scheduler(num_blocks=6)
    old, young = add(scheduler, "a", 7)[0], add(scheduler, "b", 6)[0]
    while not scheduler.preemptions:
        run(scheduler)
    scheduler.remove(old)
    run(scheduler)
    assert young.num_computed > 4
    assert young.num_cached_tokens == 0


def test_a_newcomer_leaves_a_block_for_each_running_sequence() -> None:
    scheduler, _ = make_scheduler(num_blocks=4)
    add(scheduler, "a", 7)
    run(scheduler)
    add(scheduler, "b", 8)
    assert names(run(scheduler)) == [("a", 7, 1)]
    assert scheduler.num_waiting == 1


def test_a_long_prompt_at_the_head_is_not_overtaken() -> None:
    scheduler, _ = make_scheduler(num_blocks=8)
    first = add(scheduler, "a", 15)[0]
    run(scheduler)
    add(scheduler, "b", 25)
    add(scheduler, "c", 2)
    assert names(run(scheduler)) == [("a", 15, 1)]
    scheduler.remove(first)
    assert names(run(scheduler))[0] == ("b", 0, 25)


def test_a_prefill_that_others_share_with_takes_the_blocks_of_the_youngest_out_of_the_step() -> None:
    """The window of a prompt's prefill passes blocks that a later sequence holds, so that nothing becomes free."""
    pools = [BlockPool(100, 4), BlockPool(7, 4, Window(8))]
    scheduler = Scheduler(SequenceMemory(pools, most_launched=8), StepPacer(150, FittedCost()), 8)
    (first,) = make_sequences("first", list(range(40)))
    scheduler.add([first])
    assert [names(run(scheduler)) for _ in range(2)] == [[("first", 0, 8)], [("first", 8, 8)]]
    (second,) = make_sequences("second", list(range(17)))
    scheduler.add([second])
    assert names(run(scheduler)) == [("first", 16, 8), ("second", 16, 1)]
    assert set(first.tables[1][2:4]) == set(second.tables[1][2:4])
    # The decode of the second is scheduled before the chunk that needs its blocks.
    assert names(run(scheduler)) == [("first", 24, 8)]
    assert scheduler.preemptions == 1
    for _ in range(4):
        assert names(run(scheduler))[0][0] == "first"
    scheduler.remove(first)
    assert names(run(scheduler))[0][0] == "second"


def test_who_outgrows_the_original_context_begins_again_in_its_place() -> None:
    scheduler, pool = make_scheduler(original_context=9)
    for name, length in (("a", 7), ("b", 2), ("c", 7)):
        add(scheduler, name, length)
    run(scheduler)
    assert names(run(scheduler)) == [("a", 7, 1), ("b", 2, 1), ("c", 7, 1)]
    assert names(run(scheduler)) == [("a", 8, 1), ("b", 3, 1), ("c", 8, 1)]
    assert names(run(scheduler)) == [("b", 4, 1), ("a", 0, 10), ("c", 0, 10)]
    assert names(run(scheduler)) == [("a", 10, 1), ("b", 5, 1), ("c", 10, 1)]
    assert scheduler.preemptions == 0
    assert pool.num_used == 3 + 2 + 3


def test_who_outgrows_it_waits_for_its_newest_token() -> None:
    scheduler, _ = make_scheduler(original_context=9)
    (sequence,) = add(scheduler, "a", 9)
    sequence.runs_ahead = True
    (chunk,) = scheduler.schedule()
    sequence.num_launched, sequence.num_unread = 9, 1
    assert scheduler.schedule() == [], "the step before knows its tenth token"
    scheduler.commit(chunk)
    sequence.num_unread = 0
    sequence.tokens.append(5)
    assert names(scheduler.schedule()) == [("a", 0, 10)]
    assert sequence.is_long


def test_a_pool_that_cannot_hold_one_sequence_is_noticed() -> None:
    scheduler, _ = make_scheduler(num_blocks=2)
    add(scheduler, "a", 7)
    run(scheduler)
    run(scheduler)
    with pytest.raises(AssertionError, match="cannot hold"):
        run(scheduler)


CONTEXT = 48
arrivals = st.lists(
    st.tuples(
        st.integers(0, 12),  # step
        st.integers(1, 40),  # prompt length
        st.sampled_from([0, 0, 7]),  # which shared prefix
        st.integers(1, 3),  # candidates
        st.integers(1, 10),  # tokens to sample
    ),
    max_size=12,
)


@settings(max_examples=examples(60))
@given(arrivals, st.integers(0, 20), st.integers(1, 6))
def test_everybody_is_served_in_any_pool(
    plan: list[tuple[int, int, int, int, int]], spare: int, max_running: int
) -> None:
    scheduler, pool = make_scheduler(CONTEXT // 4 + 1 + spare, 4, max_running)
    ends: dict[Sequence, int] = {}
    finished = 0
    for step in range(4000):
        for number, (when, length, prefix, candidates, tokens) in enumerate(plan):
            if when == step:
                sequences = make_sequences(str(number), [prefix + i for i in range(length)], candidates)
                ends |= dict.fromkeys(sequences, length + tokens)
                scheduler.add(sequences)
        batch = run(scheduler)
        assert len({work.sequence for work in batch}) == len(batch) <= max_running
        assert all(work.num_tokens > 0 for work in batch)
        for sequence in [work.sequence for work in batch if len(work.sequence.tokens) == ends[work.sequence]]:
            scheduler.remove(sequence)
            finished += 1
        scheduler.check()
        if step > 12 and not (scheduler.num_running or scheduler.num_waiting):
            break
        assert batch or step <= 12, "work waits, but nothing is scheduled"
    assert finished == len(ends) == sum(candidates for _, _, _, candidates, _ in plan)
    assert pool.num_used == 0

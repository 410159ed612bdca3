"""The pacer against simulated machines."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.cache.block_pool import BlockPool
from engine.scheduling.chunk_budget import (
    ALONE_FACTOR,
    FIRST_CHUNKS,
    FIXED_SHARE_ALONE,
    FIXED_SHARE_BESIDE,
    GROWTH,
    MAX_CHUNK,
    MIN_CHUNK,
    STRETCH,
    CostOverDecodes,
    FittedCost,
    RecordedCost,
    StepCost,
    StepPacer,
)
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from engine.scheduling.sequence_memory import SequenceMemory


@dataclass(frozen=True)
class Machine:
    """What steps cost in seconds: one that only decodes, and one with prefill: ``fixed`` and ``token`` for each token.

    ``floor`` is the time that the host needs to launch a step with prefill, which the device's work overlaps. ``noise``
    is by how large a share steps vary.
    """

    decode: float
    fixed: float
    token: float
    floor: float = 0.0
    noise: float = 0.0

    def prefill(self, tokens: int) -> float:
        return max(self.floor, self.fixed + self.token * tokens)


def settled(machine: Machine, num_decodes: int, cost: type[StepCost] = FittedCost) -> tuple[StepPacer, int]:
    """A pacer after some steps of that machine, and the last chunk that it chose."""
    pacer, rnd, chunk = StepPacer(150, cost()), random.Random(0), 0

    def varied(seconds: float) -> float:
        return seconds * (1 + machine.noise * rnd.uniform(-1, 1))

    for _ in range(10):
        pacer.record(num_decodes, 0, varied(machine.decode))
    for _ in range(60):
        chunk = pacer.prefill_budget(num_decodes)
        pacer.record(num_decodes, chunk, varied(machine.prefill(chunk)))
    return pacer, chunk


both = pytest.mark.parametrize("cost", [FittedCost, CostOverDecodes])


@pytest.mark.parametrize("num_decodes", [0, 8])
def test_the_first_chunks_are_small_and_of_two_sizes(num_decodes: int) -> None:
    pacer = StepPacer(150, FittedCost())
    pacer.record(num_decodes, 0, 0.01)
    for expected in FIRST_CHUNKS:
        assert pacer.prefill_budget(num_decodes) == expected
        pacer.record(num_decodes, expected - 5, 0.1)
        pacer.record(num_decodes, expected, 0.1)
    assert pacer.prefill_budget(num_decodes) != expected


CPUS = {
    "small model": Machine(decode=0.006, fixed=0.006, token=0.00025),
    "quantised 8B": Machine(decode=0.2, fixed=0.2, token=0.008),
    "slow prefill": Machine(decode=0.08, fixed=0.08, token=0.003),
}


@both
@pytest.mark.parametrize("noise", [0.0, 0.15])
@pytest.mark.parametrize("name", CPUS)
def test_a_step_beside_decodes_takes_as_long_as_it_may(name: str, noise: float, cost: type[StepCost]) -> None:
    machine = CPUS[name]
    _, chunk = settled(Machine(machine.decode, machine.fixed, machine.token, noise=noise), 4, cost)
    assert machine.prefill(chunk) == pytest.approx(STRETCH * machine.decode, rel=0.05 + noise)


# Steps of a GPU, milliseconds (decodes of 8 sequences) and microseconds for each token of prefill. Mixed steps are
# launched operator by operator, which takes 333 to 363 us a layer, whatever they carry.
GPUS = {
    "0.6B on an H100": Machine(decode=1.5e-3, fixed=1.5e-3, token=2.5e-6, floor=10.0e-3),
    "4B on an H100": Machine(decode=3.8e-3, fixed=3.8e-3, token=13e-6, floor=12.6e-3),
    "8B on an H200": Machine(decode=5.2e-3, fixed=5.2e-3, token=26e-6, floor=11.2e-3),
    "8B, launches not overlapped": Machine(decode=5.2e-3, fixed=11.7e-3, token=26e-6),
}


@pytest.mark.parametrize("noise", [0.0, 0.15])
@pytest.mark.parametrize("name", GPUS)
def test_chunks_are_worth_a_step_that_costs_much_whatever_it_carries(name: str, noise: float) -> None:
    """A prompt of 4,000 tokens beside 8 decodes. With chunks for three decode steps it took 26 to 219 steps."""
    machine = GPUS[name]
    pacer, _ = settled(Machine(machine.decode, machine.fixed, machine.token, machine.floor, noise), 8)
    left, steps, longest = 4000, 0, 0.0
    while left:
        chunk = min(left, pacer.prefill_budget(8))
        seconds = machine.prefill(chunk)
        pacer.record(8, chunk, seconds)
        left, steps, longest = left - chunk, steps + 1, max(longest, seconds)
    assert steps <= 8
    fixed = max(machine.floor, machine.fixed)
    assert longest < max(STRETCH * machine.decode, fixed / FIXED_SHARE_BESIDE) * 1.5


def test_many_short_prompts_do_not_pay_for_a_step_each() -> None:
    """64 clients, 128 tokens in and out, on a 0.6B: 19,800 tok/s if their prompts are computed at once."""
    machine = GPUS["0.6B on an H100"]
    pool, pacer = BlockPool(64 * 17 + 1, 16), StepPacer(150, FittedCost())
    scheduler, seconds, answered = Scheduler(SequenceMemory([pool]), pacer, 256), 0.0, 0

    def arrive(number: int) -> None:
        sampling = SamplingParams(max_tokens=128)
        prompt = [number * 128 + i for i in range(128)]
        scheduler.add([Sequence(Request(str(number), tuple(prompt), sampling), 0, prompt)])

    for number in range(64):
        arrive(number)
    while answered < 256:
        batch = scheduler.schedule()
        prefill = [work.num_tokens for work in batch if work.num_tokens > 1]
        taken = machine.prefill(sum(prefill)) if prefill else machine.decode + 0.02e-3 * len(batch)
        seconds += taken
        pacer.record(len(batch) - len(prefill), sum(prefill), taken)
        for work in batch:
            scheduler.commit(work)
            if work.samples:
                work.sequence.tokens.append(7)
            if work.sequence.num_sampled == 128:
                scheduler.remove(work.sequence)
                arrive(64 + answered)
                answered += 1
    assert answered * 128 / seconds > 15_000


def test_steps_take_longer_where_more_wait_than_decode() -> None:
    budgets = []
    for waiting in (1, 8, 16, 32, 1000):
        pacer, _ = settled(Machine(decode=0.01, fixed=0.01, token=0.0001), 8)
        pacer.record(0, 2000, 0.21)
        budgets.append(pacer.prefill_budget(8, waiting))
    assert budgets[0] == budgets[1] < budgets[2] < budgets[3] < budgets[4] == pytest.approx(1400, rel=0.1)


@both
def test_steps_without_decodes_may_take_longer(cost: type[StepCost]) -> None:
    _, chunk = settled(Machine(decode=0.0, fixed=0.01, token=0.003), 0, cost)
    assert 0.01 + chunk * 0.003 == pytest.approx(0.15 * ALONE_FACTOR, rel=0.05)


def test_alone_the_fixed_cost_is_at_most_a_fifth() -> None:
    machine = Machine(decode=0.4, fixed=0.4, token=0.001)
    _, chunk = settled(machine, 0)
    assert machine.fixed / machine.prefill(chunk) == pytest.approx(FIXED_SHARE_ALONE, rel=0.05)


@both
@pytest.mark.parametrize("token", [0.5, 5.0])
def test_a_chunk_is_never_tiny(token: float, cost: type[StepCost]) -> None:
    assert settled(Machine(decode=0.02, fixed=0.02, token=token), 64, cost)[1] == MIN_CHUNK


@both
def test_a_fast_machine_is_bounded(cost: type[StepCost]) -> None:
    assert settled(Machine(decode=0.0, fixed=0.0, token=1e-9), 0, cost)[1] == MAX_CHUNK


@both
def test_a_clock_that_stands_still_is_survived(cost: type[StepCost]) -> None:
    assert settled(Machine(decode=0.0, fixed=0.0, token=0.0), 0, cost)[1] == MAX_CHUNK


@both
def test_a_chunk_is_never_much_larger_than_any_before_it(cost: type[StepCost]) -> None:
    pacer, largest = StepPacer(150, cost()), 0
    for _ in range(20):
        chunk = pacer.prefill_budget(0)
        assert chunk <= max(FIRST_CHUNKS[-1], GROWTH * largest)
        largest = max(largest, chunk)
        pacer.record(0, chunk, 1e-9)
    assert largest == MAX_CHUNK


@pytest.mark.parametrize(("cost", "steps"), [(FittedCost, 10), (CostOverDecodes, 30)])
def test_a_slow_first_step_is_forgotten(cost: type[StepCost], steps: int) -> None:
    pacer = StepPacer(150, cost())
    pacer.record(0, FIRST_CHUNKS[0], 5.0)
    for _ in range(steps):
        chunk = pacer.prefill_budget(0)
        pacer.record(0, chunk, 0.001 * chunk)
    assert chunk == pytest.approx(600, rel=0.1)


def test_outdated_decode_times_do_not_make_prefill_look_free() -> None:
    pacer = StepPacer(150, FittedCost())
    for _ in range(10):
        pacer.record(64, 0, 0.14)
    for _ in range(40):
        chunk = pacer.prefill_budget(1)
        pacer.record(1, chunk, 0.01 + 0.003 * chunk)
        assert 0.01 + 0.003 * chunk < 0.3
    assert 0.01 + 0.003 * chunk < 0.07


def test_one_pause_of_the_machine_hardly_changes_a_chunk() -> None:
    machine = CPUS["small model"]
    pacer, chunk = settled(machine, 4)
    pacer.record(4, chunk, 3.0)
    assert pacer.prefill_budget(4) == pytest.approx(chunk, rel=0.5)


def test_where_steps_are_alike_a_price_that_rises_is_followed() -> None:
    """On a CPU a token of a long prompt costs more, the further it is from the beginning."""
    pacer, done, longest = StepPacer(150, CostOverDecodes()), 0, 0.0
    for _ in range(10):
        pacer.record(8, 0, 0.02)
    while done < 4000:
        chunk = pacer.prefill_budget(8)
        seconds = 0.02 + chunk * (0.0005 + done * 2.5e-7)
        pacer.record(8, chunk, seconds)
        longest = max(longest, seconds) if done > 200 else 0.0
        done += chunk
    assert 0.8 * STRETCH < longest / 0.02 < 1.1 * STRETCH


def test_the_fixed_cost_is_told_from_the_price() -> None:
    cost = FittedCost()
    for tokens in (32, 500, 64, 2000, 128):
        cost.add(0, tokens, 0.01 + 0.0001 * tokens)
    assert cost.line == pytest.approx((0.01, 0.0001))
    for _ in range(5000):  # one size alone, for long
        cost.add(0, 2000, 0.21)
    assert cost.line == pytest.approx((0.01, 0.0001), rel=0.01)


@pytest.mark.parametrize("seconds", [(0.2, 0.1), (0.1, 0.9)])
def test_neither_part_is_ever_negative(seconds: tuple[float, float]) -> None:
    cost = FittedCost()
    cost.add(0, 100, seconds[0])
    cost.add(0, 400, seconds[1])
    assert min(cost.line) == 0
    assert max(cost.line) > 0


# An 8B on an H100: a decode step of 8 sequences took 7.9 ms with sampling, 512 tokens with it 16.2 ms on the device.
# The others are estimates. ``PAST`` is what attention of a token costs for each one before it.
RECORDED = {16: 7.2e-3, 64: 7.5e-3, 128: 8.4e-3, 256: 10.6e-3, 384: 13.4e-3, 512: 16.2e-3, 768: 22.1e-3, 1024: 28e-3}
DECODE, DECODE_REPLAY, PAST = 7.9e-3, 7.0e-3, 2.1e-9


def step_seconds(num_decodes: int, chunk: int, past: int, extra: float = DECODE - DECODE_REPLAY) -> float:
    """A replayed step; ``extra`` is for sampling and the past of the decodes."""
    size = next(size for size in RECORDED if size >= num_decodes + chunk)
    return RECORDED[size] + extra + PAST * chunk * (past + chunk / 2)


def computed(pacer: StepPacer, prompt: int, rnd: random.Random, noise: float = 0.0) -> list[tuple[int, float]]:
    """The chunks of a prompt beside 8 decodes, and how long their steps took."""
    past, steps = 0, []
    while past < prompt:
        chunk = min(prompt - past, pacer.prefill_budget(8))
        seconds = step_seconds(8, chunk, past) * (1 + noise * rnd.uniform(-1, 1))
        pacer.record(8, chunk, seconds)
        steps.append((chunk, seconds))
        past += chunk
    return steps


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_decodes_wait_at_most_three_of_their_steps_for_a_recorded_one(noise: float, warm: bool) -> None:
    """A prompt of 4,000 tokens beside 8 decodes, the first one of all included."""
    pacer, rnd = StepPacer(150, RecordedCost(RECORDED, DECODE_REPLAY)), random.Random(0)
    for _ in range(20 * warm):
        pacer.record(8, 0, DECODE * (1 + noise * rnd.uniform(-1, 1)))
    for _ in range(5):
        steps = computed(pacer, 4000, rnd, noise)
        assert max(seconds for _, seconds in steps) <= 3 * DECODE
        assert len(steps) <= 11
        assert all(8 + chunk in RECORDED for chunk, _ in steps[:-1])
        for _ in range(60):
            pacer.record(8, 0, DECODE * (1 + noise * rnd.uniform(-1, 1)))


def test_chunks_shrink_as_the_past_grows_and_recover_after_it() -> None:
    pacer, rnd = StepPacer(150, RecordedCost(RECORDED, DECODE_REPLAY)), random.Random(0)
    for _ in range(10):
        pacer.record(8, 0, DECODE)
    steps = computed(pacer, 30_000, rnd)
    assert max(seconds for _, seconds in steps) <= 3.5 * DECODE  # the estimate is some steps behind
    assert [chunk for chunk, _ in steps[:-1]] == sorted((chunk for chunk, _ in steps[:-1]), reverse=True)
    assert steps[0][0] >= 2 * steps[-2][0]
    assert computed(pacer, 4000, rnd)[-2][0] == steps[0][0]


def test_alone_or_with_many_waiting_a_recorded_step_is_full() -> None:
    pacer = StepPacer(150, RecordedCost(RECORDED, DECODE_REPLAY))
    assert pacer.prefill_budget(0) == 1024
    for _ in range(20):
        pacer.record(8, 0, DECODE)
    assert pacer.prefill_budget(8, num_waiting=56) == 1024 - 8


def test_decodes_that_became_cheaper_are_noticed_while_prompts_come() -> None:
    pacer = StepPacer(150, RecordedCost(RECORDED, DECODE_REPLAY))
    for _ in range(20):
        pacer.record(256, 0, 0.023)
    for _ in range(3):
        chunk = pacer.prefill_budget(8)
        pacer.record(8, chunk, step_seconds(8, chunk, 0))
    assert step_seconds(8, pacer.prefill_budget(8), 0) <= 3 * DECODE


def test_where_the_smallest_recorded_step_is_slow_a_chunk_is_worth_it() -> None:
    slow = {size: 0.03 + 1e-5 * size for size in RECORDED}
    pacer = StepPacer(150, RecordedCost(slow, 0.005))
    assert pacer.prefill_budget(8) == 1024 - 8


def test_decodes_that_leave_no_room_in_a_recorded_step_are_paced_as_unrecorded() -> None:
    pacer = StepPacer(150, RecordedCost({16: 0.01, 64: 0.01}, 0.01))
    assert pacer.prefill_budget(64 - MIN_CHUNK) == MIN_CHUNK
    for expected in FIRST_CHUNKS:
        assert pacer.prefill_budget(64 - MIN_CHUNK + 1) == expected
        pacer.record(64, expected, 0.04)
    assert pacer.prefill_budget(64, 1) > 64


def test_one_pause_does_not_change_the_next_recorded_chunk_much() -> None:
    pacer = StepPacer(150, RecordedCost(RECORDED, DECODE_REPLAY))
    for _ in range(20):
        pacer.record(8, 0, DECODE)
    before = pacer.prefill_budget(8)
    pacer.record(8, before, 3.0)
    assert pacer.prefill_budget(8) >= before / 2

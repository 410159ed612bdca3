"""Slots that are shared fairly: whose turn it is, who is refused, and that no slot is ever lost."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.waiting import PATIENCE

from server.errors import ResourceExhausted
from server.offload.fair import FairSlots

BUSY = "All are taken. Please try again later."


class Jobs:
    """Jobs that hold a slot until they are told to end, and the order in which they got it."""

    def __init__(self, slots: FairSlots) -> None:
        self._slots = slots
        self._ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.began: list[str] = []
        self.held: list[str] = []

    def start(self, name: str, patience: float | None = None) -> None:
        """The first letter of the name is the owner's."""
        self._ends[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._run(name, patience))

    async def _run(self, name: str, patience: float | None) -> None:
        async with self._slots.of(name[0], patience):
            self.began.append(name)
            self.held.append(name)
            try:
                await self._ends[name].wait()
            finally:
                self.held.remove(name)

    @property
    def waiting(self) -> list[str]:
        return [name for name, task in self.tasks.items() if not task.done() and name not in self.began]

    def end(self, name: str) -> None:
        self._ends[name].set()

    async def end_all(self) -> None:
        for name in self.tasks:
            self.end(name)
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*self.tasks.values(), return_exceptions=True)


async def settle() -> None:
    """Everything that can happen without anybody's doing has happened."""
    for _ in range(10):
        await asyncio.sleep(0)


async def is_whole(slots: FairSlots, number: int) -> bool:
    """Whether ``number`` slots can be had at once, and no more."""
    jobs = Jobs(slots)
    for index in range(number + 1):
        jobs.start(f"z{index}")
    await settle()
    whole = len(jobs.held) == number
    await jobs.end_all()
    return whole


async def test_owners_take_turns_and_their_own_jobs_stay_in_order() -> None:
    jobs = Jobs(FairSlots(1, BUSY))
    for name in ("a0", "a1", "a2", "a3", "b1", "b2", "c1"):
        jobs.start(name)
    await settle()
    assert jobs.began == ["a0"]
    await jobs.end_all()
    assert jobs.began == ["a0", "a1", "b1", "c1", "a2", "b2", "a3"]


async def test_who_has_just_come_does_not_overtake() -> None:
    jobs = Jobs(FairSlots(1, BUSY))
    jobs.start("a0")
    jobs.start("b0")
    await settle()
    jobs.end("a0")
    await jobs.tasks["a0"]
    jobs.start("c0")
    await settle()
    assert jobs.began == ["a0", "b0"]
    await jobs.end_all()


@pytest.mark.parametrize(
    ("waiting", "refused", "welcome"), [(["a1", "a2"], "a3", "b1"), (["a1", "a2", "b1"], "c1", "")]
)
async def test_too_many_of_one_owner_and_too_many_in_all(waiting: list[str], refused: str, welcome: str) -> None:
    slots = FairSlots(1, BUSY, most=3, most_of_one=2)
    jobs = Jobs(slots)
    for name in ("a0", *waiting):
        jobs.start(name)
    await settle()
    with pytest.raises(ResourceExhausted) as caught:
        async with slots.of(refused[0]):
            pass
    assert caught.value.message == BUSY
    if welcome:
        jobs.start(welcome)
        await settle()
        assert welcome in jobs.waiting
    await jobs.end_all()
    assert await is_whole(slots, 1)


async def test_patience_ends_in_a_refusal_and_leaves_no_trace() -> None:
    slots = FairSlots(1, BUSY)
    jobs = Jobs(slots)
    jobs.start("a0")
    await settle()
    with pytest.raises(ResourceExhausted, match="try again later"):
        async with slots.of("b", patience=0.001):
            pass
    assert slots._waiting == {}
    await jobs.end_all()
    assert await is_whole(slots, 1)


async def test_patience_is_for_waiting_and_not_for_the_work() -> None:
    slots = FairSlots(1, BUSY)
    async with slots.of("a", patience=0.001):
        await asyncio.sleep(0.01)


async def test_who_is_cancelled_with_the_slot_in_hand_hands_it_on() -> None:
    slots = FairSlots(1, BUSY)
    jobs = Jobs(slots)
    for name in ("a0", "b0", "c0"):
        jobs.start(name)
    await settle()
    jobs.end("a0")
    while jobs.held:
        await asyncio.sleep(0)  # and now the slot is b0's, which has not run yet
    assert "b0" in jobs.waiting
    jobs.tasks["b0"].cancel()
    await settle()
    assert jobs.began == ["a0", "c0"]
    await jobs.end_all()
    assert await is_whole(slots, 1)


async def test_who_goes_away_in_the_moment_of_its_turn_costs_its_owner_no_turn() -> None:
    jobs = Jobs(FairSlots(1, BUSY))
    for name in ("a0", "b0", "b1", "c0"):
        jobs.start(name)
    await settle()
    jobs.end("a0")
    jobs.tasks["b0"].cancel()
    await jobs.end_all()
    assert jobs.began == ["a0", "b1", "c0"]


async def test_a_job_that_fails_gives_its_slot_back() -> None:
    slots = FairSlots(1, BUSY)
    with suppress(ZeroDivisionError):
        async with slots.of("a"):
            _ = 1 / 0
    assert await is_whole(slots, 1)


ACTIONS = ("start", "start", "start", "end", "end", "cancel", "both")
STEPS = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 7)), min_size=30, max_size=60)


@given(number=st.integers(1, 3), steps=STEPS)
def test_whatever_happens_slots_are_used_shared_fairly_and_never_lost(
    number: int, steps: list[tuple[str, int]]
) -> None:
    asyncio.run(_play(number, steps))


async def _play(number: int, steps: list[tuple[str, int]]) -> None:
    slots = FairSlots(number, BUSY)
    jobs = Jobs(slots)
    passed: dict[str, list[str]] = {}  # by each owner that waits, whose jobs began since its last turn
    for index, (what, which) in enumerate(steps):
        begun = len(jobs.began)
        gone = _step(jobs, f"{'abc'[which % 3]}{index}", what, which)
        await settle()
        assert len(jobs.held) <= number
        assert len(jobs.held) == number or not jobs.waiting, "a slot is free although somebody waits"
        new = [name[0] for name in jobs.began[begun:]]
        owners = {name[0] for name in jobs.waiting}
        passed = {owner: [] if owner in (*new, gone) else passed.get(owner, []) + new for owner in owners}
        assert all(len(set(others)) == len(others) for others in passed.values())
    await jobs.end_all()
    assert slots._waiting == {}
    assert await is_whole(slots, number)


def _step(jobs: Jobs, name: str, what: str, which: int) -> str:
    """The owner whose job was told to go away, "" where none was."""
    if what == "start":
        jobs.start(name)
    if what in ("end", "both") and jobs.held:
        jobs.end(jobs.held[which % len(jobs.held)])
    if what in ("cancel", "both") and jobs.waiting:
        going = jobs.waiting[which % len(jobs.waiting)]
        jobs.tasks[going].cancel()
        return going[0]
    return ""


@given(number=st.integers(1, 3), owners=st.lists(st.sampled_from("abcd"), max_size=32))
def test_an_owner_that_waits_gets_every_round_one_turn(number: int, owners: list[str]) -> None:
    began = asyncio.run(_served(number, owners))[number:]
    left = {owner: sum(name[0] == owner for name in began) for owner in "abcd"}
    while began:
        rivals = [owner for owner in left if left[owner]]
        turn, began = began[: len(rivals)], began[len(rivals) :]
        assert sorted(name[0] for name in turn) == rivals
        left = {owner: left[owner] - (owner in rivals) for owner in left}


async def _served(number: int, owners: list[str]) -> list[str]:
    jobs = Jobs(FairSlots(number, BUSY))
    for index, owner in enumerate(owners):
        jobs.start(f"{owner}{index}")
    await settle()
    await jobs.end_all()
    assert len(jobs.began) == len(owners)
    return jobs.began

"""Slots of recurrent states: one for each running sequence, and snapshots that go with their blocks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples

from engine.cache.state_slots import StateSlots


def kept(slots: StateSlots, identity: int) -> int:
    slot = slots.reserve()
    assert slot is not None
    slots.keep(identity, slot)
    return slot


def test_each_running_sequence_has_a_slot_of_its_own() -> None:
    slots = StateSlots(3, 2)
    taken = [slots.take() for _ in range(3)]
    assert sorted(taken) == [0, 1, 2]
    slots.check(taken, ())
    slots.give_back(taken[1])
    assert slots.take() == taken[1]


def test_a_snapshot_is_found_until_its_block_is_forgotten() -> None:
    slots = StateSlots(1, 2)
    slot = kept(slots, 7)
    assert slots.find(7) == slot
    assert slots.find(8) is None
    slots.forget(7)
    assert slots.find(7) is None
    assert slots.num_kept == 0
    slots.check((), ())


def test_the_least_recently_used_snapshot_is_given_up() -> None:
    slots = StateSlots(1, 2)
    first, second = kept(slots, 1), kept(slots, 2)
    assert slots.find(1) == first
    assert slots.reserve() == second
    assert slots.find(2) is None


def test_what_is_reserved_cannot_be_given_up() -> None:
    slots = StateSlots(1, 1)
    slot = slots.reserve()
    assert slot == 1
    assert slots.reserve() is None
    slots.drop(slot)
    assert slots.reserve() == slot


def test_of_two_snapshots_of_one_content_the_first_stays() -> None:
    slots = StateSlots(1, 2)
    first = kept(slots, 5)
    kept(slots, 5)
    assert slots.find(5) == first
    assert slots.num_kept == 1
    slots.check((), ())


def test_check_sees_a_lost_slot() -> None:
    slots = StateSlots(2, 1)
    slots.take()
    with pytest.raises(AssertionError, match="slot of a sequence"):
        slots.check((), ())
    slots = StateSlots(2, 1)
    slots.reserve()
    with pytest.raises(AssertionError, match="slot of a snapshot"):
        slots.check((), ())


@settings(max_examples=examples(60))
@given(st.lists(st.tuples(st.sampled_from(["take", "give", "keep", "find", "forget", "drop"]), st.integers(0, 5))))
def test_no_slot_is_ever_lost(steps: list[tuple[str, int]]) -> None:
    slots = StateSlots(2, 3)
    held: list[int] = []
    found: dict[int, int] = {}
    for action, number in steps:
        if action == "take" and len(held) < 2:
            held.append(slots.take())
        elif action == "give" and held:
            slots.give_back(held.pop())
        elif action in ("keep", "drop") and (slot := slots.reserve()) is not None:
            if action == "keep":
                slots.keep(number, slot)
                found[number] = slot
            else:
                slots.drop(slot)
        elif action == "find":
            assert slots.find(number) in (None, found.get(number), *found.values())
        elif action == "forget":
            slots.forget(number)
            assert slots.find(number) is None
        slots.check(held, ())

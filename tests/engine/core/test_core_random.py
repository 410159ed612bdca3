"""Random traffic on tiny pools: every request ends once, as if it were alone, and no page is lost or shared wrongly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from support.digests import DigestSampler, Told, make_core, make_request, model_info, run_to_end, tell
from support.examples import examples

from engine.api.block_groups import BlockGroup, Window, sequence_blocks
from engine.api.events import ErrorKind, FinishReason
from engine.api.requests import Request
from engine.scheduling import chunk_budget
from engine.scheduling.chunk_budget import most_launched
from engine.scheduling.sequence import ScheduledChunk

CONTEXT = 48
POISON = 300
LAST_ARRIVAL = 15


@dataclass(frozen=True)
class Guest:
    """One request of the plan and its fate."""

    request: Request
    arrival: int
    cancel: int | None

    @property
    def is_poisoned(self) -> bool:
        return POISON in self.request.prompt


@st.composite
def guests(draw: st.DrawFn) -> list[Guest]:
    return [draw(guest(number)) for number in range(draw(st.integers(1, 8)))]


@st.composite
def guest(draw: st.DrawFn, number: int) -> Guest:
    start, length = draw(st.sampled_from([10, 10, 50])), draw(st.integers(1, CONTEXT))
    prompt = [*range(start, start + length)]
    if draw(st.integers(0, 9)) == 0:
        prompt[-1] = POISON
    instants = st.none() | st.integers(0, 40)
    deadline = draw(instants)
    request = make_request(
        f"r{number}",
        prompt,
        candidates=draw(st.integers(1, 3)),
        salt=draw(st.sampled_from(["", "", "tenant"])),
        deadline=None if deadline is None else float(deadline),
        max_tokens=draw(st.integers(1, 30)),
        seed=draw(st.integers(0, 3)),
        stop=draw(st.sampled_from([(), ("a",), ("\ufffd\ufffd",)])),
        resume_points=tuple(draw(st.lists(st.integers(0, length), max_size=2))),
    )
    return Guest(request, draw(st.integers(0, LAST_ARRIVAL)), draw(instants))


def refuse_poison(batch: list[ScheduledChunk]) -> None:
    for work in batch:
        if POISON in work.sequence.tokens[work.start : work.start + work.num_tokens]:
            raise RuntimeError("poison")


@cache
def alone(request: Request, original_context: int) -> Told:
    core, _ = make_core(info=model_info(max_context=CONTEXT, original_context=original_context))
    return run_to_end(core, replace(request))[request.id]


def serve(
    plan: list[Guest],
    spare_blocks: int,
    max_running: int,
    step_target_ms: float,
    *,
    early: bool,
    ahead: bool,
    redraws: int = 0,
    snapshots: int | None = None,
    windows: tuple[Window | None, ...] = (None,),
    original_context: int = 0,
) -> dict[str, Told]:
    step = 0
    launched = most_launched(ahead=ahead)
    needed = [sequence_blocks(window, CONTEXT, 4, launched) for window in windows]
    groups = tuple(BlockGroup(count + spare_blocks, window) for count, window in zip(needed, windows, strict=True))
    info = model_info(max_context=CONTEXT, snapshots=snapshots, groups=groups, original_context=original_context)
    core, runner = make_core(
        DigestSampler(redraws=redraws),
        info=info,
        max_running=max_running,
        step_target_ms=step_target_ms,
        clock=lambda: float(step),
        ahead=ahead,
        state_stride=8,
    )
    runner.refuse = refuse_poison
    told: dict[str, Told] = {}
    if early:
        core.stream_during_forward(lambda events: tell(told, events))
    while step <= LAST_ARRIVAL or core.has_work:
        for guest in plan:
            if guest.arrival == step:
                core.submit(guest.request)
            if guest.cancel == step:
                core.cancel(guest.request.id)
        tell(told, core.step())
        core.check()
        step += 1
        assert step < 3000, "the core does not come to an end"
    return told


def expect_as_alone(guest: Guest, told: Told, original_context: int) -> None:
    assert told.done is not None
    expected = alone(guest.request, original_context)
    if told.done.error is None:
        assert (told.tokens, told.text, told.reasons) == (expected.tokens, expected.text, expected.reasons)
        return
    for candidate, tokens in told.tokens.items():
        assert tokens == expected.tokens[candidate][: len(tokens)]
        assert expected.text[candidate].startswith(told.text[candidate])
    if told.done.error.kind is ErrorKind.REFUSED:
        assert told == Told(done=told.done)
    else:
        assert FinishReason.ABORTED in told.reasons.values()
        assert set(told.reasons) == set(range(guest.request.candidates))


def expect_a_reason(guest: Guest, told: Told) -> None:
    assert told.done is not None
    kind = told.done.error.kind if told.done.error else None
    possible: set[ErrorKind | None] = {ErrorKind.INTERNAL} if guest.is_poisoned else {None}
    possible |= {ErrorKind.CANCELLED} if guest.cancel is not None else set()
    possible |= {ErrorKind.DEADLINE} if guest.request.deadline is not None else set()
    possible |= {ErrorKind.REFUSED} if len(guest.request.prompt) >= CONTEXT else set()
    assert kind in possible


def expect_each(plan: list[Guest], told: dict[str, Told], original_context: int) -> None:
    assert set(told) == {guest.request.id for guest in plan}
    for guest in plan:
        expect_a_reason(guest, told[guest.request.id])
        expect_as_alone(guest, told[guest.request.id], original_context)


@settings(max_examples=examples(160))
@given(
    guests(),
    st.integers(0, 12),
    st.integers(1, 6),
    st.sampled_from([1e-6, 1e9]),
    st.booleans(),
    st.sampled_from([None, 0, 2, 5]),
    st.sampled_from([None, 0, 1, 2, 9]),
    st.sampled_from([0, 0, 7, 24, 40]),
)
def test_random_traffic(
    plan: list[Guest],
    spare_blocks: int,
    max_running: int,
    step_target_ms: float,
    early: bool,
    redraws: int | None,
    snapshots: int | None,
    original_context: int,
) -> None:
    """``redraws`` is None where each step is read before the next one is launched, ``snapshots`` for a model without
    recurrent states. Beyond an ``original_context`` above 0 sequences begin again."""
    told = serve(
        plan,
        spare_blocks,
        max_running,
        step_target_ms,
        early=early,
        ahead=redraws is not None,
        redraws=redraws or 0,
        snapshots=snapshots,
        original_context=original_context,
    )
    expect_each(plan, told, original_context)


WINDOWS = [
    (None, Window(6)),
    (Window(7),),
    (None, Window(5), Window(8, chunked=True)),
    (Window(1), Window(3, chunked=True)),
]


@settings(max_examples=examples(160))
@given(
    guests(),
    st.integers(0, 8),
    st.integers(1, 6),
    st.sampled_from([1e-6, 1e9]),
    st.sampled_from([None, 0, 2, 5]),
    st.sampled_from(WINDOWS),
    st.sampled_from([0, 20]),
)
def test_random_traffic_over_windows(
    plan: list[Guest],
    spare_blocks: int,
    max_running: int,
    step_target_ms: float,
    redraws: int | None,
    windows: tuple[Window | None, ...],
    original_context: int,
) -> None:
    """Each pool has as many blocks as one sequence ever holds, and a few more: nothing may be lost or wait for ever."""
    ahead = redraws is not None
    with patch.object(chunk_budget, "MAX_CHUNK", 8):
        told = serve(
            plan,
            spare_blocks,
            max_running,
            step_target_ms,
            early=False,
            ahead=ahead,
            redraws=redraws or 0,
            windows=windows,
            original_context=original_context,
        )
    expect_each(plan, told, original_context)

"""Steps that are launched before the tokens of the one before are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.digests import (
    DigestRunner,
    DigestSampler,
    LowGrammars,
    ScriptedSampler,
    Told,
    ids,
    make_core,
    make_request,
    model_info,
    run_to_end,
    tell,
)
from support.examples import examples
from support.tiny import EOS_ID

from engine.api.events import FinishReason
from engine.api.requests import Request
from engine.api.sampling import Thinking
from engine.constraints.masks import Mask
from engine.core.core import Core
from engine.scheduling.contracts import Sampled
from engine.scheduling.sequence import Sequence


class Recorded(DigestSampler):
    """Notes when steps are launched and when their tokens are read."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def launch(
        self, logits: list[int], sequences: list[Sequence], masks: list[Mask | None], pending: list[int | None]
    ) -> list[Sampled]:
        self.log.append("launch")
        return super().launch(logits, sequences, masks, pending)

    def finish(self, launched: list[Sampled]) -> list[Sampled]:
        self.log.append("read")
        return super().finish(launched)


def batches_of(runner: DigestRunner) -> list[list[str]]:
    return [[chunk.sequence.request.id for chunk in batch] for batch in runner.batches]


def test_a_step_is_launched_before_the_one_before_is_read() -> None:
    sampler = Recorded()
    core, _ = make_core(sampler, ahead=True)
    run_to_end(core, make_request(max_tokens=4, stop_ids=()))
    assert sampler.log == ["launch", "launch", "read", "launch", "read", "launch", "read", "read"]


def test_no_step_is_launched_beyond_the_last_token() -> None:
    core, runner = make_core(ScriptedSampler(ids("abcdef")), ahead=True, step_target_ms=1e9)
    run_to_end(core, make_request(max_tokens=3), make_request("one", max_tokens=1))
    assert batches_of(runner) == [["r", "one"], ["r"], ["r"]]


def test_the_context_limits_it_too() -> None:
    info = model_info(num_blocks=3, max_context=9)
    core, runner = make_core(ScriptedSampler(ids("abcdef")), info=info, ahead=True, step_target_ms=1e9)
    told = run_to_end(core, make_request(prompt=range(10, 16), max_tokens=50))["r"]
    assert (told.text, told.reasons) == ({0: "abc"}, {0: FinishReason.MAX_TOKENS})
    assert len(runner.batches) == 3


def test_a_stop_found_late_discards_one_step() -> None:
    core, runner = make_core(ScriptedSampler(ids("ab")), ahead=True, step_target_ms=1e9)
    told = run_to_end(core, make_request(max_tokens=50))["r"]
    assert (told.text, told.tokens, told.reasons) == ({0: "ab"}, {0: list(ids("ab"))}, {0: FinishReason.STOP})
    assert len(runner.batches) == 4, "the step after the end token was on its way when that was read"
    assert (core.stats().used_blocks, core.has_work) == (0, False)


def test_one_constrained_row_takes_every_second_step_and_delays_no_other() -> None:
    free = [make_request(f"free{number}", range(20, 24 + number), max_tokens=12, stop_ids=()) for number in range(3)]
    core, runner = make_core(grammars=LowGrammars(), ahead=True, step_target_ms=1e9)
    for request in free:
        core.submit(request)
    told = run_to_end(core, make_request("bound", max_tokens=50, grammar="5"))
    steps = [[name for name in batch if name == "bound"] for batch in batches_of(runner)]
    taken = [step for step, names in enumerate(steps) if names]
    assert len(taken) == 5
    assert [later - sooner for sooner, later in pairwise(taken)] == [2] * 4
    first = next(step for step, batch in enumerate(batches_of(runner)) if "free0" in batch)
    assert all("free0" in batch for batch in batches_of(runner)[first : first + 12])
    assert len(told["bound"].tokens[0]) == 5


def test_a_redrawn_token_discards_the_step_that_it_should_have_fed() -> None:
    plain, _ = make_core(DigestSampler(), step_target_ms=1e9)
    request = make_request(max_tokens=9, stop_ids=())
    expected = run_to_end(plain, request)["r"]
    core, runner = make_core(DigestSampler(redraws=3), ahead=True, step_target_ms=1e9)
    assert run_to_end(core, request)["r"] == expected
    assert len(runner.batches) > 9
    # Every third token that is left to the device is redrawn, those of discarded steps among them.
    assert core.stats().sampled_tokens >= 9
    assert 0 < core.stats().redrawn_tokens < core.stats().sampled_tokens


def test_what_was_launched_on_a_step_that_fails_is_launched_again() -> None:
    class Failing(DigestSampler):
        failures = 0

        def finish(self, launched: list[Sampled]) -> list[Sampled]:
            if len(launched) == 2 and self.failures < 3:
                self.failures += 1
                raise FloatingPointError("the model's logits are not finite")
            return super().finish(launched)

    requests = [make_request(name, range(10, 15), max_tokens=12, seed=seed) for seed, name in enumerate("ab")]
    expected = [run_to_end(make_core(ahead=False)[0], request)[request.id] for request in requests]
    sampler = Failing()
    core, _ = make_core(sampler, ahead=True, step_target_ms=1e9)
    told = run_to_end(core, *requests)
    assert sampler.failures == 3
    assert [told[request.id].tokens for request in requests] == [one.tokens for one in expected]


def test_a_step_lasts_from_the_end_of_the_one_before() -> None:
    clock = [0.0]

    class Slow(Recorded):
        def finish(self, launched: list[Sampled]) -> list[Sampled]:
            clock[0] += 10.0
            return super().finish(launched)

    core, _ = make_core(Slow(), ahead=True, step_target_ms=1e9)
    core._executor._timer = lambda: clock[0]
    seconds: list[float] = []
    record = core._executor._pacer.record

    def note(num_decodes: int, num_prefill_tokens: int, taken: float) -> None:
        seconds.append(taken)
        record(num_decodes, num_prefill_tokens, taken)

    core._executor._pacer.record = note  # type: ignore[method-assign]
    run_to_end(core, make_request(max_tokens=5, stop_ids=()))
    assert seconds == [10.0] * 5


@dataclass
class Plan:
    """Requests with thoughts, grammars and stops, and when they come and are cancelled."""

    requests: list[Request]
    arrivals: list[int] = field(default_factory=list)


START, END = ids("<"), ids(">")


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    requests, arrivals = [], []
    for number in range(draw(st.integers(1, 5))):
        more: dict[str, Any] = {}
        if draw(st.booleans()):
            budget = draw(st.none() | st.integers(0, 6))
            more["thinking"] = Thinking(START, END, open=draw(st.booleans()), budget=budget)
        if draw(st.booleans()):
            more["grammar"] = str(draw(st.integers(1, 8)))
        length = draw(st.integers(1, 30))
        params = {"seed": draw(st.integers(0, 5)), "max_tokens": draw(st.integers(1, 25))}
        requests.append(make_request(f"r{number}", range(10, 10 + length), **params, **more))
        arrivals.append(draw(st.integers(0, 10)))
    return Plan(requests, arrivals)


@settings(max_examples=examples(120))
@given(plans(), st.integers(0, 10), st.sampled_from([0, 2, 3]), st.sampled_from([0, 0, 12, 33]))
def test_masks_thoughts_and_redraws_change_no_answer(
    plan: Plan, spare_blocks: int, redraws: int, original_context: int
) -> None:
    info = model_info(num_blocks=16 + spare_blocks, max_context=64, original_context=original_context)

    def told_by(core: Core) -> dict[str, Told]:
        told: dict[str, Told] = {}
        for step in range(2000):
            for request, arrival in zip(plan.requests, plan.arrivals, strict=True):
                if arrival == step:
                    core.submit(request)
            tell(told, core.step())
            core.check()
            if step > max(plan.arrivals) and not core.has_work:
                return told
        pytest.fail("the core does not come to an end")

    plain, _ = make_core(info=info, grammars=LowGrammars(), ahead=False)
    ahead, _ = make_core(DigestSampler(redraws=redraws), info=info, grammars=LowGrammars(), ahead=True)
    expected, found = told_by(plain), told_by(ahead)
    for request in plan.requests:
        one, other = expected[request.id], found[request.id]
        assert one.done is not None
        assert one.done.error is None
        assert (one.tokens, one.text, one.thoughts, one.reasons) == (
            other.tokens,
            other.text,
            other.thoughts,
            other.reasons,
        )
    assert EOS_ID not in [token for one in found.values() for tokens in one.tokens.values() for token in tokens]

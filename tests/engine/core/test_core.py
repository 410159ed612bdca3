"""The loop: what every request is told, alone and among others, when all goes well and when it does not."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace

import pytest
from support import digests
from support.digests import (
    FIRST_BYTE,
    ScriptedSampler,
    Told,
    ids,
    make_core,
    make_request,
    model_info,
    run_to_end,
    tell,
)
from support.tiny import EOS_ID, VOCAB_SIZE
from tokenizers import Tokenizer

from engine.api.errors import EngineUnavailable
from engine.api.events import Delta, ErrorKind, FinishReason, RequestError, RequestEvents
from engine.api.requests import Request
from engine.constraints.masks import Mask
from engine.core.candidate import Candidate
from engine.core.core import Core
from engine.scheduling.contracts import Sampled
from engine.scheduling.sequence import ScheduledChunk, Sequence

POISON = 300


@pytest.fixture(autouse=True, params=["at once", "early", "ahead"])
def told_early(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds as well where texts are made while the device computes the next step, and where steps are
    launched before the tokens of the one before are read."""
    if request.param == "at once":
        return
    if request.param == "ahead":
        monkeypatch.setattr(digests, "AHEAD", True)
    step = Core.step

    def both(core: Core) -> list[RequestEvents]:
        told: list[RequestEvents] = []
        core.stream_during_forward(told.extend)
        later = step(core)
        merged = {events.request_id: events for events in told}
        for events in later:
            before = merged.get(events.request_id, RequestEvents(events.request_id))
            merged[events.request_id] = replace(events, deltas=before.deltas + events.deltas)
        return list(merged.values())

    monkeypatch.setattr(Core, "step", both)


def error_of(told: Told) -> RequestError:
    assert told.done is not None
    assert told.done.error is not None
    return told.done.error


def succeeded(told: Told) -> bool:
    return told.done is not None and told.done.error is None


def refuse_poison(batch: list[ScheduledChunk]) -> None:
    for work in batch:
        if POISON in work.sequence.tokens[work.start : work.start + work.num_tokens]:
            raise RuntimeError("secret internals")


def alone(request: Request) -> Told:
    core, _ = make_core()
    return run_to_end(core, request)[request.id]


# How candidates end


def test_the_end_token_ends_and_is_not_reported() -> None:
    core, _ = make_core(ScriptedSampler(ids("Paris")))
    told = run_to_end(core, make_request())["r"]
    assert (told.text, told.tokens) == ({0: "Paris"}, {0: list(ids("Paris"))})
    assert told.reasons == {0: FinishReason.STOP}
    assert told.done is not None
    assert (told.done.prompt_tokens, told.done.cached_tokens, told.done.candidate_tokens) == (3, 0, 5)
    assert told.done.error is None


def test_an_answer_without_tokens() -> None:
    core, _ = make_core(ScriptedSampler([]))
    told = run_to_end(core, make_request())["r"]
    assert (told.text, told.reasons) == ({}, {0: FinishReason.STOP})


def test_max_tokens() -> None:
    core, _ = make_core(ScriptedSampler(ids("abcdef")))
    told = run_to_end(core, make_request(max_tokens=3))["r"]
    assert (told.text, told.reasons) == ({0: "abc"}, {0: FinishReason.MAX_TOKENS})


def test_the_end_of_the_context() -> None:
    core, _ = make_core(ScriptedSampler(ids("a" * 100)), info=model_info(num_blocks=2, max_context=8))
    told = run_to_end(core, make_request(prompt=(5,) * 5, max_tokens=100))["r"]
    assert (told.text, told.reasons) == ({0: "aaa"}, {0: FinishReason.MAX_TOKENS})


def test_a_stop_string_cuts_the_text_but_not_the_tokens() -> None:
    core, _ = make_core(ScriptedSampler(ids("one STOP two")))
    told = run_to_end(core, make_request(max_tokens=50, stop=("STOP",)))["r"]
    assert (told.text, told.reasons) == ({0: "one "}, {0: FinishReason.STOP})
    assert told.tokens == {0: list(ids("one STOP"))}


def test_held_back_text_is_told_when_the_end_token_comes() -> None:
    core, _ = make_core(ScriptedSampler(ids("one ST")))
    told = run_to_end(core, make_request(max_tokens=50, stop=("STOP",)))["r"]
    assert (told.text, told.reasons) == ({0: "one ST"}, {0: FinishReason.STOP})
    assert told.tokens == {0: list(ids("one ST"))}


def test_held_back_text_is_told_at_max_tokens() -> None:
    core, _ = make_core(ScriptedSampler(ids("a👍")))
    told = run_to_end(core, make_request(max_tokens=3))["r"]
    assert (told.text, told.reasons) == ({0: "a\ufffd"}, {0: FinishReason.MAX_TOKENS})


def test_a_stop_string_in_the_last_held_back_text_is_a_stop() -> None:
    core, _ = make_core(ScriptedSampler(ids("a👍")))
    told = run_to_end(core, make_request(max_tokens=3, stop=("\ufffd",)))["r"]
    assert (told.text, told.reasons) == ({0: "a"}, {0: FinishReason.STOP})


def test_logprobs_come_with_their_tokens() -> None:
    core, _ = make_core()
    told = run_to_end(core, make_request(logprobs=0), make_request("plain"))
    assert len(told["r"].logprobs[0]) == len(told["r"].tokens[0]) > 0
    assert told["plain"].logprobs == {0: []}


def test_markers_stay_in_the_text() -> None:
    answer = ScriptedSampler([1, *ids("hi")])
    told = run_to_end(make_core(answer)[0], make_request("plain"), make_request("marked", markers=(1,)))
    assert told["plain"].text == {0: "hi"}
    assert told["marked"].text == {0: "<|im_start|>hi"}


# Candidates and the prefix cache


def test_candidates_share_the_prompt() -> None:
    core, runner = make_core(ScriptedSampler(ids("one"), ids("three"), []))
    told = run_to_end(core, make_request(prompt=range(10, 60), candidates=3))["r"]
    assert told.text == {0: "one", 1: "three"}
    assert told.reasons == dict.fromkeys(range(3), FinishReason.STOP)
    assert told.done is not None
    assert (told.done.prompt_tokens, told.done.cached_tokens, told.done.candidate_tokens) == (50, 0, 8)
    prefilled = sum(work.num_tokens for batch in runner.batches for work in batch if work.start < 50)
    assert prefilled == 50 + 2 + 2


def test_a_cached_prompt_gives_the_same_answer() -> None:
    core, _ = make_core()
    request = make_request(prompt=range(10, 50), max_tokens=30)
    first, second = run_to_end(core, request)["r"], run_to_end(core, request)["r"]
    assert first.done is not None
    assert second.done is not None
    assert (first.done.cached_tokens, second.done.cached_tokens) == (0, 36)
    assert replace(second, done=None) == replace(first, done=None)


def test_another_salt_does_not_share() -> None:
    core, _ = make_core()
    run_to_end(core, make_request(prompt=range(10, 50), salt="a"))
    told = run_to_end(core, make_request(prompt=range(10, 50), salt="b"))["r"]
    assert told.done is not None
    assert told.done.cached_tokens == 0


def test_an_answer_is_the_prefix_of_the_next_turn() -> None:
    core, _ = make_core(ScriptedSampler(ids("a" * 20)))
    told = run_to_end(core, make_request(prompt=range(10, 22), max_tokens=20))["r"]
    again = run_to_end(core, make_request(prompt=(*range(10, 22), *told.tokens[0], 7)))["r"]
    assert again.done is not None
    assert again.done.cached_tokens == 28


@pytest.mark.parametrize("step_target_ms", [1e-6, 1e9])
def test_preempted_and_chunked_requests_answer_as_alone(step_target_ms: float) -> None:
    info = model_info(num_blocks=16, max_context=64)
    core, _ = make_core(info=info, step_target_ms=step_target_ms)
    requests = [
        make_request(f"r{number}", range(10 + number, 10 + number + 4 * number), max_tokens=40, stop_ids=())
        for number in range(1, 7)
    ]
    told = run_to_end(core, *requests)
    assert core.stats().preemptions > 0
    for request in requests:
        assert replace(told[request.id], done=None) == replace(alone(request), done=None)


# Requests that do not run to their end


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (make_request(prompt=()), ["prompt", "empty"]),
        (make_request(prompt=[VOCAB_SIZE]), ["prompt", str(VOCAB_SIZE)]),
        (make_request(prompt=[5] * 128), ["prompt", "128", "127"]),
        (make_request(max_tokens=0), ["max_tokens"]),
        (make_request(temperature=float("nan")), ["temperature"]),
    ],
)
def test_what_cannot_be_served_is_refused_by_the_next_step(request_: Request, words: list[str]) -> None:
    core, runner = make_core()
    told = run_to_end(core, request_, make_request("good"))
    error = error_of(told["r"])
    assert error.kind is ErrorKind.REFUSED
    assert [word for word in words if word not in error.message] == []
    assert told["good"].reasons
    assert all(work.sequence.request.id == "good" for batch in runner.batches for work in batch)


def test_a_duplicate_id_is_refused_and_the_first_goes_on() -> None:
    core, _ = make_core(ScriptedSampler(ids("abc")))
    core.submit(make_request())
    core.submit(make_request())
    refused, *first = core.step()
    assert refused.done is not None
    assert refused.done.error is not None
    assert refused.done.error.kind is ErrorKind.REFUSED
    assert "'r'" in refused.done.error.message
    told: dict[str, Told] = {}
    tell(told, first)
    run_to_end(core, told=told)
    assert told["r"].text == {0: "abc"}


def test_an_id_can_be_used_again_after_its_end() -> None:
    core, _ = make_core(ScriptedSampler(ids("abc")))
    assert run_to_end(core, make_request())["r"].text == run_to_end(core, make_request())["r"].text


def test_cancel_ends_with_the_next_step_and_gives_the_pages_back() -> None:
    core, _ = make_core(ScriptedSampler(ids("a" * 50), ids("b"), []))
    core.submit(make_request(candidates=3, max_tokens=50))
    told: dict[str, Told] = {}
    for _ in range(6):
        tell(told, core.step())
    core.cancel("r")
    core.cancel("r")
    tell(told, core.step())
    assert told["r"].reasons == {2: FinishReason.STOP, 1: FinishReason.STOP, 0: FinishReason.ABORTED}
    assert error_of(told["r"]).kind is ErrorKind.CANCELLED
    assert not core.has_work
    assert core.stats().used_blocks == 0
    core.check()


def test_cancelling_what_waits_or_is_unknown() -> None:
    core, runner = make_core()
    core.cancel("unknown")
    assert not core.has_work
    core.submit(make_request(candidates=3))
    core.cancel("r")
    told = run_to_end(core)["r"]
    assert told.reasons == dict.fromkeys(range(3), FinishReason.ABORTED)
    assert error_of(told).kind is ErrorKind.CANCELLED
    assert runner.batches == []


def test_the_deadline_counts_while_waiting_and_while_running() -> None:
    now = 0.0
    core, _ = make_core(ScriptedSampler(ids("a" * 50)), max_running=1, clock=lambda: now)
    core.submit(make_request("running", deadline=5.0, max_tokens=50))
    core.submit(make_request("waiting", deadline=5.0))
    core.submit(make_request("later", deadline=99.0))
    told: dict[str, Told] = {}
    for _ in range(5):
        now += 1.0
        tell(told, core.step())
    run_to_end(core, told=told)
    assert error_of(told["running"]).kind is error_of(told["waiting"]).kind is ErrorKind.DEADLINE
    # The step that is in flight when the deadline passes is not read.
    assert told["running"].tokens in ({0: list(ids("aaa"))}, {0: list(ids("aaaa"))})
    assert told["later"].reasons == {0: FinishReason.MAX_TOKENS}


# Steps that fail


def test_a_failing_request_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    core, runner = make_core()
    runner.refuse = refuse_poison
    good = [make_request(f"good{number}", range(10, 20 + number), max_tokens=20) for number in range(3)]
    bad = make_request("bad", (*range(10, 50), POISON), candidates=2)
    told = run_to_end(core, good[0], bad, *good[1:])
    error = error_of(told["bad"])
    assert error.kind is ErrorKind.INTERNAL
    assert "secret" not in error.message
    assert told["bad"].reasons == dict.fromkeys(range(2), FinishReason.ABORTED)
    for request in good:
        assert replace(told[request.id], done=None) == replace(alone(request), done=None)
        assert succeeded(told[request.id])
    failure = next(record for record in caplog.records if record.levelno == logging.ERROR)
    assert "bad" in failure.getMessage()
    assert failure.exc_info is not None
    assert "secret" in str(failure.exc_info[1])


def test_a_failing_candidate_ends_its_request_and_no_other_work_of_it_is_done() -> None:
    core, runner = make_core(ScriptedSampler(ids("abcdefgh")))
    core.submit(make_request("bad", candidates=3))
    core.submit(make_request("good"))

    def refuse_candidate_1(batch: list[ScheduledChunk]) -> None:
        if any(work.sequence.request.id == "bad" and work.sequence.candidate == 1 for work in batch):
            raise RuntimeError

    runner.refuse = refuse_candidate_1
    told = run_to_end(core)
    assert error_of(told["bad"]).kind is ErrorKind.INTERNAL
    assert told["good"].text == {0: "abcdefgh"}
    assert all(work.sequence.candidate != 2 for batch in runner.batches if len(batch) == 1 for work in batch)


class Panic(BaseException):
    """As Rust code panics: no ``Exception``."""


def test_a_panic_in_a_step_ends_its_request_alone() -> None:
    core, runner = make_core()

    def panic(batch: list[ScheduledChunk]) -> None:
        if any(work.sequence.request.id == "bad" for work in batch):
            raise Panic("index out of bounds")

    runner.refuse = panic
    told = run_to_end(core, make_request("good"), make_request("bad", candidates=2), make_request("fine"))
    assert error_of(told["bad"]).kind is ErrorKind.INTERNAL
    assert succeeded(told["good"])
    assert succeeded(told["fine"])


def test_a_tokenizer_that_panics_on_a_text_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking one "a" off both ends of "a" is too much for tokenizers."""
    described = json.loads(digests.TOKENIZER.to_str())
    strip = {"type": "Strip", "content": "a", "start": 1, "stop": 1}
    described["decoder"] = {"type": "Sequence", "decoders": [described["decoder"], strip]}
    monkeypatch.setattr(digests, "TOKENIZER", Tokenizer.from_str(json.dumps(described)))
    core, _ = make_core(ScriptedSampler(ids("bcd"), ids("abc")))
    told = run_to_end(core, make_request("bad", candidates=2), make_request("good"))
    error = error_of(told["bad"])
    assert error.kind is ErrorKind.INTERNAL
    assert "slice" not in error.message
    assert succeeded(told["good"])
    assert told["good"].text == {0: "bcd"}
    core.check()


@pytest.mark.parametrize("own", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
def test_what_ends_the_interpreter_is_no_failed_request(own: type[BaseException]) -> None:
    core, runner = make_core()

    def end(batch: list[ScheduledChunk]) -> None:
        raise own

    runner.refuse = end
    core.submit(make_request())
    with pytest.raises(own):
        core.step()
    assert len(runner.batches) == 1


def test_a_failing_sampler_fails_alone_too() -> None:
    class Picky(ScriptedSampler):
        def choose(self, row: int, sequence: Sequence, mask: Mask | None) -> Sampled:
            if sequence.request.id == "bad" and sequence.num_sampled + sequence.num_unread == 2:
                raise ValueError("no")
            return super().choose(row, sequence, mask)

    core, _ = make_core(Picky(ids("abcd")))
    told = run_to_end(core, make_request("bad"), make_request("good"))
    assert (told["bad"].text, told["good"].text) == ({0: "ab"}, {0: "abcd"})
    assert error_of(told["bad"]).kind is ErrorKind.INTERNAL


def test_a_failing_candidate_fails_alone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = Candidate.feed

    def feed_or_fail(self: Candidate, sampled: Sampled) -> list[Delta]:
        if self._sequence.request.id == "bad":
            raise RuntimeError("secret internals")
        return feed(self, sampled)

    monkeypatch.setattr(Candidate, "feed", feed_or_fail)
    core, _ = make_core()
    told = run_to_end(core, make_request("good"), make_request("bad", candidates=2), make_request("fine"))
    assert succeeded(told["good"])
    assert succeeded(told["fine"])
    assert error_of(told["bad"]).kind is ErrorKind.INTERNAL
    assert "secret" not in error_of(told["bad"]).message
    core.check()


def test_a_passing_failure_of_the_batch_hurts_nobody() -> None:
    core, runner = make_core()
    requests = [make_request(f"r{number}", range(10, 15 + number), max_tokens=20) for number in range(3)]

    def refuse_batches(batch: list[ScheduledChunk]) -> None:
        if len(batch) > 1:
            raise MemoryError

    runner.refuse = refuse_batches
    told = run_to_end(core, *requests)
    assert all(told[request.id].text == alone(request).text for request in requests)


def test_a_lost_device_is_not_retried() -> None:
    core, runner = make_core()

    def lose(batch: list[ScheduledChunk]) -> None:
        raise EngineUnavailable("the device is lost")

    runner.refuse = lose
    core.submit(make_request())
    with pytest.raises(EngineUnavailable):
        core.step()
    assert len(runner.batches) == 1


def test_a_device_that_fails_with_any_error_is_asked_whether_it_is_lost() -> None:
    core, runner = make_core()

    def fail(batch: list[ScheduledChunk]) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def be_lost() -> None:
        raise EngineUnavailable("the device cuda:0 is lost")

    runner.refuse, runner.check = fail, be_lost
    core.submit(make_request("a"))
    core.submit(make_request("b"))
    with pytest.raises(EngineUnavailable, match="lost"):
        core.step()
    assert len(runner.batches) == 1, "nothing is tried again on a lost device"


def test_a_leak_is_logged_when_idle_and_raised_by_check(caplog: pytest.LogCaptureFixture) -> None:
    core, _ = make_core(ScriptedSampler([]))
    core._pools[0].allocate(1)
    core.submit(make_request())
    while core.has_work:
        core.step()
    assert "1 blocks and 0 sequences were not given back" in caplog.text
    with pytest.raises(AssertionError):
        core.check()


def test_stats() -> None:
    core, _ = make_core(ScriptedSampler(ids("a" * 20)), max_running=1)
    core.submit(make_request("a", max_tokens=20))
    core.submit(make_request("b", candidates=2))
    told: dict[str, Told] = {}
    tell(told, core.step())
    stats = core.stats()
    assert (stats.running, stats.waiting, stats.used_blocks, stats.total_blocks, stats.steps) == (1, 2, 1, 64, 1)
    run_to_end(core, told=told)
    assert core.stats().used_blocks == core.stats().running == core.stats().waiting == 0


def test_a_pool_smaller_than_the_context_is_noticed() -> None:
    with pytest.raises(AssertionError, match="longest context"):
        make_core(info=model_info(num_blocks=2, max_context=9))


def test_tokens_of_the_tests_are_text() -> None:
    assert min(ids("aé👍")) >= FIRST_BYTE > EOS_ID


def test_each_turn_computes_its_new_tokens_and_at_most_a_stride() -> None:
    """Earlier thoughts are not shown again: a turn repeats the prompt before it, but not the answer to it."""
    stride = 16
    core, runner = make_core(info=model_info(num_blocks=400, max_context=1200, snapshots=20), state_stride=stride)
    history: list[int] = []
    shown_before = 0
    for turn in range(10):
        shown = [*history, *range(40 + turn, 60 + turn)]
        prompt = [*shown, 7, 8]  # the last two open the thoughts of the answer
        before = len(runner.batches)
        told = run_to_end(core, make_request("r", prompt, resume_points=(len(shown),), max_tokens=12))["r"]
        computed = sum(chunk.num_tokens for batch in runner.batches[before:] for chunk in batch)
        new = len(prompt) - shown_before + len(told.tokens[0])
        assert computed <= new + stride
        assert told.done is not None
        assert told.done.cached_tokens >= shown_before - stride
        history, shown_before = [*shown, 9, *told.tokens[0][5:]], len(shown)

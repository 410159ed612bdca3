"""Thoughts, grammars and stops together, through the core with a scripted model and grammars in pure Python."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
from support import digests
from support.digests import ScriptedSampler, Told, ids, make_core, make_request, model_info, run_to_end, tell
from support.tiny import EOS_ID, VOCAB_SIZE

from engine.api.errors import RequestRefused
from engine.api.events import ErrorKind, FinishReason
from engine.api.requests import Request
from engine.api.sampling import Thinking
from engine.constraints import masks
from engine.constraints.contracts import Grammars, Matcher
from engine.constraints.masks import Mask
from engine.core.core import Core


@pytest.fixture(autouse=True, params=["at once", "ahead"])
def runs_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds as well where steps are launched before the tokens of the one before are read."""
    monkeypatch.setattr(digests, "AHEAD", request.param == "ahead")


START, END = ids("<t>"), ids("</t>")
OPEN = Thinking(START, END, open=True)
CLOSED = Thinking(START, END)


@dataclass
class Literal:
    """A grammar of one text; at a "!" it meets a limit, and no token of the model is a "?"."""

    tokens: tuple[int, ...]
    place: int = 0
    error: str = ""

    @property
    def accepting(self) -> bool:
        return self.place == len(self.tokens)

    @property
    def stopped(self) -> bool:
        return self.accepting or bool(self.error)

    def mask(self) -> Mask:
        if self.tokens[self.place : self.place + 1] == ids("!"):
            self.error = "limit 7"
        return masks.only(set(self.tokens[self.place : self.place + 1]).difference(ids("?")), VOCAB_SIZE)

    def allows(self, token_id: int) -> bool:
        return self.tokens[self.place : self.place + 1] == (token_id,)

    def consume(self, token_id: int) -> None:
        assert self.allows(token_id)
        self.place += 1

    def restart(self) -> None:
        self.place = 0

    def copy(self) -> Literal:
        return Literal(self.tokens, self.place, self.error)


class Literals:
    """Builds ``Literal``; refuses "bad", fails for "broken", and waits for ``gate`` before it builds "slow"."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def build(self, grammar: str) -> Matcher:
        if grammar == "bad":
            raise RequestRefused("grammar cannot be compiled: bad")
        if grammar == "broken":
            raise RuntimeError("secret")
        if grammar == "slow":
            assert self.gate.wait(20)
        return Literal(ids(grammar))


def answer(script: str, **sampling: object) -> Told:
    core, _ = make_core(ScriptedSampler(ids(script)), grammars=Literals())
    return run_to_end(core, make_request(**{"max_tokens": 60, **sampling}))["r"]  # type: ignore[arg-type]


def run_until_done(core: Core, name: str) -> Told:
    seen: dict[str, Told] = {}
    for _ in range(200):
        tell(seen, core.step())
        core.check()
        if name in seen and seen[name].done is not None:
            return seen[name]
    raise AssertionError(f"{name} did not end")


def told(result: Told) -> tuple[str, str, FinishReason]:
    return result.thought_text.get(0, ""), result.text.get(0, ""), result.reasons[0]


# Thoughts


@pytest.mark.parametrize(
    ("script", "thinking", "thought", "text"),
    [
        ("hm</t>yes", OPEN, "hm</t>", "yes"),
        ("hm", OPEN, "hm", ""),
        ("<t>hm</t>yes", CLOSED, "<t>hm</t>", "yes"),
        ("a<t>hm</t>b<t>c</t>d", CLOSED, "<t>hm</t><t>c</t>", "abd"),
        ("a<t", CLOSED, "", "a<t"),
        ("a<tt<t>b", CLOSED, "<t>b", "a<tt"),
        ("<t>hm</t>yes", None, "", "<t>hm</t>yes"),
        ("hm, long", Thinking(START, END, open=True, budget=2), "hm</t>", "ng"),
        ("long", Thinking(START, END, open=True, budget=0), "</t>", ""),
        ("<t>long", Thinking(START, END, budget=1), "<t>l</t>", ""),
        ("hm</ long", Thinking(START, END, open=True, budget=4), "hm</t>", "ong"),
        ("👍", Thinking(START, END, open=True, budget=3), "\ufffd</t>", ""),
    ],
)
def test_thoughts(script: str, thinking: Thinking | None, thought: str, text: str) -> None:
    assert told(answer(script, thinking=thinking)) == (thought, text, FinishReason.STOP)


def test_an_incomplete_character_stays_on_its_side_of_the_thoughts_end() -> None:
    core, _ = make_core(ScriptedSampler([*ids("a👍")[:3], 1, *ids("b")]))
    result = run_to_end(core, make_request(thinking=Thinking((), (1,), open=True)))["r"]
    assert told(result) == ("a\ufffd", "b", FinishReason.STOP)


def test_max_tokens_counts_thoughts() -> None:
    result = answer("hmm</t>yes", thinking=OPEN, max_tokens=5)
    assert told(result) == ("hmm</", "", FinishReason.MAX_TOKENS)
    assert result.done is not None
    assert (result.done.candidate_tokens, result.done.thought_tokens) == (5, 5)


def test_a_held_head_is_told_at_max_tokens() -> None:
    assert told(answer("a<t>", thinking=CLOSED, max_tokens=3)) == ("", "a<t", FinishReason.MAX_TOKENS)


def test_stops_do_not_count_in_thoughts_nor_in_exempt_spans() -> None:
    result = answer("x.y</t>a[.]b.c", thinking=OPEN, stop=(".",), stop_exempt=(("[", "]"),))
    assert told(result) == ("x.y</t>", "a[.]b", FinishReason.STOP)


def test_a_stop_does_not_reach_across_thoughts() -> None:
    result = answer("a<t>x</t>bab", thinking=CLOSED, stop=("ab",))
    assert told(result) == ("<t>x</t>", "ab", FinishReason.STOP)


# Grammars


@pytest.mark.parametrize(
    ("script", "thinking", "thought", "text"),
    [
        ("??", None, "", "{1}"),
        ("hm</t>??", OPEN, "hm</t>", "{1}"),
        ("<t>x</t>", CLOSED, "<t>x</t>", "{1}"),
        ("<????</t>", CLOSED, "<t>??</t>", "{1}"),
        ("{<t>", CLOSED, "", "{1}"),
        ("<t>{1</t>?<t>", Thinking(START, END, budget=2), "<t>{1</t>", "{1}"),
    ],
)
def test_the_grammar_begins_after_the_thoughts(script: str, thinking: Thinking | None, thought: str, text: str) -> None:
    assert told(answer(script, thinking=thinking, grammar="{1}")) == (thought, text, FinishReason.STOP)


@pytest.mark.parametrize(
    ("script", "thought", "text"),
    [("<t>x</t>", "<t>x</t>", "<tool>"), ("<tool>", "", "<tool>"), ("<to?", "", "<tool>")],
)
def test_a_grammar_may_begin_as_the_start_marker_does(script: str, thought: str, text: str) -> None:
    assert told(answer(script, thinking=CLOSED, grammar="<tool>")) == (thought, text, FinishReason.STOP)


def test_an_end_token_in_thoughts_is_held_off_where_an_answer_must_follow() -> None:
    budget = Thinking(START, END, open=True, budget=5)
    result = answer("hm", thinking=budget, grammar="{1}")
    assert len(result.thoughts[0]) == 5 + len(END)
    assert (result.text[0], result.reasons[0]) == ("{1}", FinishReason.STOP)


def test_the_end_of_the_grammar_needs_no_further_forward() -> None:
    core, runner = make_core(ScriptedSampler(()), grammars=Literals(), step_target_ms=1e9)
    run_to_end(core, make_request(grammar="abc"))
    assert len(runner.batches) == 3


def test_an_empty_grammar_ends_without_a_token() -> None:
    empty: Grammars = type("Empty", (), {"build": lambda self, grammar: Literal(())})()
    core, _ = make_core(ScriptedSampler(ids("x")), grammars=empty)
    result = run_to_end(core, make_request(grammar="-"))["r"]
    assert (result.tokens, result.reasons) == ({}, {0: FinishReason.STOP})


def test_a_limit_ends_its_candidate_alone() -> None:
    core, _ = make_core(ScriptedSampler(ids("free")), grammars=Literals())
    result = run_to_end(core, make_request(grammar="ab!c"), make_request("other"))
    assert told(result["r"]) == ("", "ab", FinishReason.MALFORMED)
    assert "limit 7" in result["r"].messages[0]
    assert result["r"].done is not None
    assert result["r"].done.error is None
    assert told(result["other"]) == ("", "free", FinishReason.STOP)


def test_what_no_token_continues_ends_its_candidate_alone() -> None:
    core, _ = make_core(ScriptedSampler(ids("abc")), grammars=Literals())
    result = run_to_end(core, make_request(grammar="ab?c"), make_request("other"))
    assert told(result["r"]) == ("", "ab", FinishReason.MALFORMED)
    assert result["r"].messages[0].endswith("no token continues it.")
    assert told(result["other"]) == ("", "abc", FinishReason.STOP)


class Panic(BaseException):
    """As Rust code panics: no ``Exception``."""


@dataclass
class Panicking(Literal):
    """Panics where it is asked to do what ``at`` says."""

    at: str = ""

    def mask(self) -> Mask:
        self._panic("mask")
        return super().mask()

    def consume(self, token_id: int) -> None:
        self._panic("consume")
        super().consume(token_id)

    def copy(self) -> Panicking:
        self._panic("copy")
        return Panicking(self.tokens, at=self.at)

    def _panic(self, place: str) -> None:
        if place == self.at:
            raise Panic("index out of bounds")


class PanickingGrammars:
    """Builds what panics where the grammar says, and panics itself for "build"."""

    def build(self, grammar: str) -> Matcher:
        matcher = Panicking(ids("abc"), at=grammar)
        matcher._panic("build")
        return matcher


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("build", ErrorKind.REFUSED),
        ("copy", ErrorKind.REFUSED),
        ("mask", ErrorKind.INTERNAL),
        ("consume", ErrorKind.INTERNAL),
    ],
)
def test_a_grammar_that_panics_ends_its_request_alone(place: str, kind: ErrorKind) -> None:
    core, _ = make_core(ScriptedSampler(ids("free")), grammars=PanickingGrammars())
    result = run_to_end(core, make_request(grammar=place, candidates=2), make_request("other"))
    assert result["r"].done is not None
    assert result["r"].done.error is not None
    assert result["r"].done.error.kind is kind
    assert "bounds" not in result["r"].done.error.message
    assert told(result["other"]) == ("", "free", FinishReason.STOP)


@pytest.mark.parametrize("grammar", ["bad", "broken"])
def test_a_grammar_that_cannot_be_built_is_refused(grammar: str) -> None:
    core, _ = make_core(ScriptedSampler(ids("free")), grammars=Literals())
    result = run_to_end(core, make_request(grammar=grammar), make_request("other"))
    assert result["r"].done is not None
    assert result["r"].done.error is not None
    assert result["r"].done.error.kind is ErrorKind.REFUSED
    assert "grammar" in result["r"].done.error.message
    assert "secret" not in result["r"].done.error.message
    assert result["other"].text == {0: "free"}


def test_without_grammars_a_grammar_is_refused() -> None:
    result = run_to_end(make_core()[0], make_request(grammar="x"))["r"]
    assert result.done is not None
    assert result.done.error is not None
    assert result.done.error.kind is ErrorKind.REFUSED


def test_a_slow_grammar_keeps_nobody_waiting_and_can_be_cancelled() -> None:
    literals = Literals()
    core, _ = make_core(ScriptedSampler(ids("free")), grammars=literals)
    for name in ("slow", "gone", "queued"):
        core.submit(make_request(name, grammar="slow", candidates=2))
    core.submit(make_request("other"))
    assert run_until_done(core, "other").text == {0: "free"}
    assert core.stats().waiting == 6
    for name in ("gone", "queued"):
        core.cancel(name)
        assert run_until_done(core, name).reasons == {0: FinishReason.ABORTED, 1: FinishReason.ABORTED}
    literals.gate.set()
    assert run_to_end(core)["slow"].text == {0: "slow", 1: "slow"}


def test_a_closed_core_leaves_no_threads() -> None:
    before = set(threading.enumerate())
    literals = Literals()
    core, _ = make_core(ScriptedSampler(ids("free")), grammars=literals)
    run_to_end(core, make_request(grammar="abc"))
    for name in ("slow", "slower", "queued"):
        core.submit(make_request(name, grammar="slow"))
    threads = set(threading.enumerate()) - before
    assert {thread.name.partition("_")[0] for thread in threads} == {"grammar", "mask"}
    core.close()
    literals.gate.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_preempted_candidates_with_grammars_and_thoughts_answer_as_alone() -> None:
    def requests() -> list[Request]:
        thinking = Thinking((30,), (40, 41), open=True, budget=9)
        return [
            make_request(
                f"r{n}",
                range(10 + n, 20 + 4 * n),
                max_tokens=30,
                seed=n,
                candidates=1 + n % 2,
                grammar="a long answer" if n % 3 else None,
                thinking=thinking if n % 2 else None,
                stop_ids=(EOS_ID,) if n % 3 else (),
            )
            for n in range(1, 7)
        ]

    core, _ = make_core(info=model_info(num_blocks=16, max_context=64), grammars=Literals())
    together = run_to_end(core, *requests())
    assert core.stats().preemptions > 0
    for request in requests():
        alone = run_to_end(make_core(grammars=Literals())[0], request)[request.id]
        result = together[request.id]
        assert (result.tokens, result.text, result.thoughts) == (alone.tokens, alone.text, alone.thoughts)
        assert result.reasons == alone.reasons

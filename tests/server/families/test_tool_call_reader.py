"""From the text of a call to its name and arguments, or to the reason why there are none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.transcripts import FAMILY, TOOLS

from engine.api.events import FinishReason
from server.families.answer_syntax import AnswerSyntax
from server.families.splitter import BrokenCall, CallEnd, RegionEvent, RegionStart
from server.families.tool_call_reader import ToolCallReader

STOP, CUT = FinishReason.STOP, FinishReason.MAX_TOKENS
UNREADABLE = "The model wrote a function call that cannot be read."


def events(text: str, **captures: str) -> list[RegionEvent]:
    return [RegionStart("call"), CallEnd(text, captures)]


def read(name: str, *found: RegionEvent, reason: FinishReason = STOP) -> tuple[list[tuple[str, object]], str]:
    """The calls, and the problem."""
    reader = ToolCallReader(AnswerSyntax(FAMILY[name], TOOLS))
    calls = []
    for event in found:
        if not reader.problem:
            calls += [(call.name, call.args) for call in reader.feed(event)]
    reader.flush(reason)
    return calls, reader.problem


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(), lambda inner: st.lists(inner, max_size=3)
)


@given(st.lists(st.dictionaries(st.text(), json_values, max_size=3), min_size=1, max_size=4))
def test_calls_read_the_same_one_by_one_and_as_a_list(each: list[dict[str, object]]) -> None:
    texts = [json.dumps({"name": "get_time", "arguments": args}, ensure_ascii=False) for args in each]
    expected = ([("get_time", args) for args in each], "")
    assert read("hermes", *(event for text in texts for event in events(text))) == expected
    assert read("phi", *events(f"[{', '.join(texts)}]")) == expected


def test_arguments_get_the_types_of_the_schema() -> None:
    text = "<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    called = read("qwen-xml", *events(text, name="get_weather"))
    assert called == ([("get_weather", {"city": "Paris", "days": 3})], "")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", UNREADABLE),
        ("[]]", UNREADABLE),
        ('{"name": 1}', UNREADABLE),
        ('{"name": "get_time", "arguments": {"a": NaN}}', UNREADABLE),
        ('{"name": "fly"}', "The model called 'fly', which is not among the declared functions."),
        ('{"name": "get_time", "arguments": [1]}', "The model called get_time with arguments that are not an object."),
    ],
)
def test_what_cannot_be_called(text: str, problem: str) -> None:
    assert read("hermes", *events(text)) == ([], problem)
    assert read("hermes", *events(text), reason=CUT) == ([], ""), "what a limit cut off is unfinished, not wrong"


def test_arguments_that_nobody_could_read_back_are_refused() -> None:
    for depth, is_good in ((60, True), (70, False), (5000, False)):
        nested = '{"a":' * depth + "1" + "}" * depth
        calls, problem = read("hermes", *events(f'{{"name": "get_time", "arguments": {nested}}}'))
        assert bool(calls) == is_good == (not problem)


def test_a_call_that_does_not_end_is_a_problem_unless_a_limit_cut_it_off() -> None:
    assert read("qwen-xml", RegionStart("call")) == (
        [],
        "The model ended its answer in the middle of a function call.",
    )
    assert read("qwen-xml", RegionStart("call"), reason=CUT) == ([], "")


def test_a_broken_call_cannot_be_read() -> None:
    assert read("hermes", BrokenCall()) == ([], UNREADABLE)


def test_only_models_that_learned_to_call_mean_the_same_call_twice() -> None:
    twice = [*events('{"name": "get_time"}'), *events('{"name": "get_time", "arguments": {}}')]
    assert read("hermes", *twice) == ([("get_time", {}), ("get_time", {})], "")
    assert read("castor", *twice) == ([("get_time", {})], "")

"""Where regions of an answer begin and end, in every cut of the text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples
from support.transcripts import FAMILY, FRAGMENTS, TOOLS, cases, cut

from engine.api.events import FinishReason
from server.families.answer_syntax import AnswerSyntax
from server.families.family import Family
from server.families.splitter import (
    BrokenCall,
    CallEnd,
    RegionEvent,
    RegionSplitter,
    RegionStart,
    RegionText,
)

STOP, CUT = FinishReason.STOP, FinishReason.MAX_TOKENS


def split(syntax: AnswerSyntax, texts: Iterable[str], reason: FinishReason = STOP) -> list[RegionEvent]:
    """The events of an answer, neighbouring texts joined; nothing is said after a broken call."""
    splitter = RegionSplitter(syntax)
    joined: list[RegionEvent] = []
    for event in [*(event for text in texts for event in splitter.feed(text)), *splitter.flush(reason)]:
        last = joined[-1] if joined else None
        if isinstance(event, RegionText) and isinstance(last, RegionText):
            assert event.region == last.region
            joined[-1] = RegionText(event.region, last.text + event.text)
        else:
            joined.append(event)
        if isinstance(event, BrokenCall):
            break
    return joined


@pytest.mark.parametrize(("family", "case"), list(cases()))
def test_a_transcript_is_split_the_same_in_every_cut(family: Family, case: dict[str, Any]) -> None:
    syntax = AnswerSyntax(family, case.get("tools", TOOLS), case.get("opened", False), case.get("constrained", False))
    for reason in (STOP, CUT):
        whole = split(syntax, [case["text"]], reason)
        assert all(split(syntax, cut(case["text"], size), reason) == whole for size in range(1, 8))


@pytest.mark.parametrize("name", sorted(FAMILY))
@settings(max_examples=examples(25))
@given(st.data())
def test_any_text_is_split_the_same_in_every_cut(name: str, data: st.DataObject) -> None:
    pieces = data.draw(st.lists(st.sampled_from(FRAGMENTS), max_size=14))
    opened, constrained = data.draw(st.booleans()), data.draw(st.booleans())
    syntax = AnswerSyntax(FAMILY[name], data.draw(st.sampled_from([TOOLS, []])), opened, constrained)
    text, reason = "".join(pieces), data.draw(st.sampled_from([STOP, CUT]))
    assert split(syntax, text, reason) == split(syntax, [text], reason) == split(syntax, pieces, reason)


@pytest.mark.parametrize("name", sorted(FAMILY))
def test_plain_text_comes_as_it_is_written(name: str) -> None:
    """Held back is at most what may be a marker."""
    family = FAMILY[name]
    splitter = RegionSplitter(AnswerSyntax(family, TOOLS))
    splitter.feed(family.answer_header)
    said, told = "", ""
    for char in "It is sunny.\nIf a < b, go to=there; <b>see</b> [1] {2}: x\n\n" * 2:
        said += char
        told += "".join(event.text for event in splitter.feed(char) if isinstance(event, RegionText))
        assert said.startswith(told)
        assert len(said) - len(told) < 12


def test_a_marker_within_a_json_string_is_text() -> None:
    text = '<tool_call>{"name": "write", "arguments": {"text": "a </tool_call> \\" b"}}</tool_call>'
    body = text.removeprefix("<tool_call>").removesuffix("</tool_call>")
    assert split(AnswerSyntax(FAMILY["hermes"], TOOLS), text) == [RegionStart("call"), CallEnd(body, {})]


def test_what_markers_hold_comes_with_the_end_of_a_call() -> None:
    events = split(AnswerSyntax(FAMILY["mistral"], TOOLS), ["[TOOL_CALLS]get_time[ARGS]{}"])
    assert events == [RegionStart("call"), CallEnd("{}", {"name": "get_time"})]


def test_a_call_in_tags_ends_with_its_last_marker_only() -> None:
    syntax = AnswerSyntax(FAMILY["qwen-xml"], TOOLS)
    text = "<tool_call>\n<function=get_time>\n"
    for reason in (STOP, CUT):
        assert split(syntax, text, reason) == [RegionStart("call")]
        assert CallEnd("\n", {"name": "get_time"}) in split(syntax, text + "</function>\n</tool_call>", reason)


def test_the_beginning_of_a_marker_is_text_unless_a_limit_cut_the_answer_off() -> None:
    syntax = AnswerSyntax(FAMILY["hermes"], TOOLS)
    assert split(syntax, "Hi <tool_", STOP) == [RegionStart("answer"), RegionText("answer", "Hi <tool_")]
    assert split(syntax, "Hi <tool_", CUT) == [
        RegionStart("answer"),
        RegionText("answer", "Hi "),
        RegionStart("markup"),
    ]


def test_a_trigger_without_the_syntax_behind_it_is_a_broken_call() -> None:
    events = split(AnswerSyntax(FAMILY["qwen-xml"], TOOLS), "So: <tool_call>{}</tool_call>")
    assert events == [RegionStart("answer"), RegionText("answer", "So: "), BrokenCall()]


def test_behind_the_beginning_of_a_constrained_answer_all_is_text() -> None:
    for text in ("a <think>b</think>", "<<think>b</think>"):
        events = split(AnswerSyntax(FAMILY["deepseek"], (), constrained=True), [text])
        assert events == split(AnswerSyntax(FAMILY["deepseek"], (), constrained=True), text)
        assert events == [RegionStart("answer"), RegionText("answer", text)]


def test_thoughts_that_the_prompt_opened_have_no_start() -> None:
    events = split(AnswerSyntax(FAMILY["hermes"], (), open_thought=True), "Hm.</think>Yes.")
    assert events == [RegionText("thought", "Hm."), RegionStart("answer"), RegionText("answer", "Yes.")]

"""Golden transcripts: what each family writes, read whole and one character at a time with the same result."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples
from support.transcripts import FAMILY, FRAGMENTS, TOOLS, cases, cut

from engine.api.events import FinishReason
from server.families.answer_syntax import AnswerSyntax
from server.families.family import Arguments, BareKeyArguments, Family, PythonArguments, TaggedArguments
from server.families.tool_call_reader import ToolCall
from server.mapper.parts import PartsParser, Piece, Text, Thought, answer_parser


def calls_well(case: dict[str, Any]) -> bool:
    return not case.get("finish") and case.get("tools") != []


def told(pieces: Iterable[Piece]) -> list[dict[str, Any]]:
    """The pieces as transcripts write them, neighbours of a kind joined."""
    found: list[dict[str, Any]] = []
    for kind, group in groupby(pieces, type):
        members = list(group)
        if kind is ToolCall:
            found += [{"call": call.name, "args": call.args} for call in members if isinstance(call, ToolCall)]
        else:
            text = "".join(piece.text for piece in members if not isinstance(piece, ToolCall))
            found.append({"text" if kind is Text else "thought": text})
    return found


def read(syntax: AnswerSyntax, texts: Iterable[str], reason: FinishReason) -> tuple[list[dict[str, Any]], str]:
    parser = PartsParser(syntax)
    pieces = [piece for text in texts for piece in parser.feed(text)]
    pieces += parser.flush(reason)
    assert all(not isinstance(piece, Text | Thought) or piece.text for piece in pieces)
    ids = [piece.id for piece in pieces if isinstance(piece, ToolCall)]
    assert len(set(ids)) == len(ids)
    return told(pieces), parser.problem


@pytest.mark.parametrize(("family", "case"), list(cases()))
def test_a_transcript_reads_the_same_in_every_cut(family: Family, case: dict[str, Any]) -> None:
    opened, constrained = case.get("opened", False), case.get("constrained", False)
    syntax = AnswerSyntax(family, case.get("tools", TOOLS), opened, constrained)
    text, reason = case["text"], FinishReason(case.get("end", "stop"))
    whole, problem = read(syntax, [text], reason)
    assert whole == case["parts"]
    assert case.get("message", "") in problem
    assert bool(problem) == (case.get("finish") == "MALFORMED_FUNCTION_CALL")
    for size in (1, 2, 3, 7):
        assert read(syntax, cut(text, size), reason) == (whole, problem)


@pytest.mark.parametrize(("family", "case"), [case for case in cases() if calls_well(case.values[1])])
def test_an_answer_cut_anywhere_shows_no_fragment_of_a_call(family: Family, case: dict[str, Any]) -> None:
    syntax = AnswerSyntax(family, TOOLS, case.get("opened", False))
    whole = list(case["parts"])
    for length in range(len(case["text"])):
        parts, problem = read(syntax, [case["text"][:length]], FinishReason.MAX_TOKENS)
        assert not problem
        for place, part in enumerate(parts):
            expected = whole[place] if place < len(whole) else {}
            key = "text" if "text" in part else "thought"
            assert part == expected or expected.get(key, "").startswith(part.get(key, "?").rstrip()), (length, parts)


@pytest.mark.parametrize("name", sorted(FAMILY))
@settings(max_examples=examples(25))
@given(st.data())
def test_any_text_reads_the_same_in_every_cut(name: str, data: st.DataObject) -> None:
    pieces = data.draw(st.lists(st.sampled_from(FRAGMENTS), max_size=14))
    opened, constrained = data.draw(st.booleans()), data.draw(st.booleans())
    syntax = AnswerSyntax(FAMILY[name], data.draw(st.sampled_from([TOOLS, []])), opened, constrained)
    text, reason = "".join(pieces), data.draw(st.sampled_from([FinishReason.STOP, FinishReason.MAX_TOKENS]))
    assert read(syntax, text, reason) == read(syntax, [text], reason) == read(syntax, pieces, reason)


@pytest.mark.parametrize("name", ["hermes", "qwen-xml", "mistral"])
def test_white_space_at_the_end_of_thoughts_is_not_shown(name: str) -> None:
    for text in ("hm. \n", *(["hm. ", "\n"],)):
        parts, problem = read(AnswerSyntax(FAMILY[name], TOOLS, open_thought=True), text, FinishReason.STOP)
        assert (parts, problem) == ([{"thought": "hm."}], "")


def test_nothing_is_parsed_where_an_answer_can_only_be_text() -> None:
    assert answer_parser(FAMILY["castor"]) is None
    assert answer_parser(FAMILY["castor"], TOOLS) is not None
    assert answer_parser(FAMILY["hermes"]) is not None


def oslo(arguments: Arguments) -> str:
    """The argument ``city`` as a family writes it."""
    match arguments:
        case TaggedArguments(start, end):
            return f"{start.format(name='city')}Oslo{end}"
        case BareKeyArguments(quote):
            return f"{{city:{quote}Oslo{quote}}}"
        case PythonArguments():
            return "city='Oslo'"
    return '{"city": "Oslo"}'


@pytest.mark.parametrize("name", sorted(FAMILY))
@pytest.mark.parametrize("thinks", [False, True])
def test_beside_a_schema_an_answer_and_a_call_are_told_apart_in_every_cut(name: str, thinks: bool) -> None:
    family = FAMILY[name]
    if thinks and family.thought is None:
        return
    call = family.call
    starts = () if call.trigger else (f"{call.call_start}get_weather{call.name_args_separator}",)
    syntax = AnswerSyntax(family, TOOLS, constrained=True, call_starts=starts)
    before = f"{family.thought[0]}hm{family.thought[1]}\n\n" if thinks and family.thought else ""
    thought = [{"thought": "hm"}] if thinks else []
    one = ("get_weather", oslo(call.arguments))
    looks = json.dumps({"name": "get_time", "text": call.write(one), "x": family.thought})
    written = call.write(one, one) if call.is_parallel else call.write(one)
    told_calls = [{"call": "get_weather", "args": {"city": "Oslo"}}] * (
        2 if call.keeps_duplicates and call.is_parallel else 1
    )
    texts = [looks, '{"name": "get_weather"}', '{"name": "get_weather", "x": 1}', "1", '{"name": "get']
    expected = [(family.answer_header + text, [{"text": text}]) for text in texts] + [(written, told_calls)]
    for text, parts in expected:
        for size in (1, 2, 5, 10_000):
            assert read(syntax, cut(before + text, size), FinishReason.STOP) == ([*thought, *parts], ""), (text, size)
    head = written[: len(call.call_start + call.trigger) + 2]
    parts, problem = read(syntax, [before + head], FinishReason.MAX_TOKENS)
    assert (problem, [part for part in parts if "call" in part]) == ("", [])

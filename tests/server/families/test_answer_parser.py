"""Golden transcripts: what each family writes, read whole and one character at a time with the same result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples

from engine.api.events import FinishReason
from server.families.answer_parser import AnswerSyntax, Call, Piece, Text, Thought, _Trim, answer_parser
from server.families.family import Family
from server.families.table import CASTOR, FAMILIES

FOLDER = Path(__file__).parents[2] / "data" / "transcripts"
FAMILY = {family.name: family for family in FAMILIES} | {"castor": replace(CASTOR, thought=None)}


def declared(name: str, **properties: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [
    declared("get_weather", city="string", days="integer"),
    declared("get_time"),
    declared("write", text="string", options="object"),
]


def cases() -> Iterator[Any]:
    for path in sorted(FOLDER.glob("*.yaml")):
        document = yaml.safe_load(path.read_text("utf-8"))
        for case in document["cases"]:
            yield pytest.param(FAMILY[document["family"]], case, id=f"{path.stem}: {case['name']}")


def calls_well(case: dict[str, Any]) -> bool:
    return not case.get("finish") and case.get("tools") != []


def told(pieces: Iterable[Piece]) -> list[dict[str, Any]]:
    """The pieces as transcripts write them, neighbours of a kind joined."""
    found: list[dict[str, Any]] = []
    for kind, group in groupby(pieces, type):
        members = list(group)
        if kind is Call:
            found += [{"call": call.name, "args": call.args} for call in members if isinstance(call, Call)]
        else:
            text = "".join(piece.text for piece in members if not isinstance(piece, Call))
            found.append({"text" if kind is Text else "thought": text})
    return found


def read(syntax: AnswerSyntax, texts: Iterable[str], reason: FinishReason) -> tuple[list[dict[str, Any]], str]:
    parser = syntax.parser()
    pieces = [piece for text in texts for piece in parser.feed(text)]
    pieces += parser.flush(reason)
    assert all(not isinstance(piece, Text | Thought) or piece.text for piece in pieces)
    ids = [piece.id for piece in pieces if isinstance(piece, Call)]
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
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert read(syntax, pieces, reason) == (whole, problem)


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


FRAGMENTS = [
    *sorted({text for family in FAMILIES for text in (*family.markers, family.call.begin, family.call.before) if text}),
    *("<", "|", "{", "}", "[", "]", '"', "\\", ";", " ", "\n", "a", "é", "get_time", "<function=", ">", "</function>"),
    *('{"name": "get_time", "arguments": {}}', '{"name": "get_time", "parameters": {}}', "{}", "[]"),
    *("to=functions.get_time", "json", "analysis", "final", "commentary", "\n```json\n", "\n```", "function", "\0"),
]


@pytest.mark.parametrize("name", sorted(FAMILY))
@settings(max_examples=examples(25))
@given(st.data())
def test_any_text_reads_the_same_in_every_cut(name: str, data: st.DataObject) -> None:
    pieces = data.draw(st.lists(st.sampled_from(FRAGMENTS), max_size=14))
    opened, constrained = data.draw(st.booleans()), data.draw(st.booleans())
    syntax = AnswerSyntax(FAMILY[name], data.draw(st.sampled_from([TOOLS, []])), opened, constrained)
    text, reason = "".join(pieces), data.draw(st.sampled_from([FinishReason.STOP, FinishReason.MAX_TOKENS]))
    assert read(syntax, text, reason) == read(syntax, [text], reason) == read(syntax, pieces, reason)


def test_nothing_is_parsed_where_an_answer_can_only_be_text() -> None:
    assert answer_parser(FAMILY["castor"]) is None
    assert answer_parser(FAMILY["castor"], TOOLS) is not None
    assert answer_parser(FAMILY["hermes"]) is not None


def test_arguments_that_nobody_could_read_back_are_refused() -> None:
    for depth, good in ((60, True), (70, False), (5000, False)):
        nested = '{"a":' * depth + "1" + "}" * depth
        text = f'<tool_call>{{"name": "get_time", "arguments": {nested}}}</tool_call>'
        parts, problem = read(AnswerSyntax(FAMILY["hermes"], TOOLS), [text], FinishReason.STOP)
        assert bool(parts) == good == (not problem)


def test_white_space_that_is_held_back_is_not_copied_for_each_piece() -> None:
    trim = _Trim(begun=False)
    assert trim.feed("a") == "a"
    held = trim._space
    for _ in range(1000):
        assert trim.feed("\n") == ""
    assert trim._space is held
    assert trim.feed("b") == "\n" * 1000 + "b"

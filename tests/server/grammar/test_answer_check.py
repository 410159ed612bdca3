"""What finished answers are checked for, beside the jsonschema package, and that no check hangs or fails a request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.child_jobs import hoarding, sleeping
from support.schemas import Schema

from server.errors import ResourceExhausted
from server.families.tool_call_reader import ToolCall
from server.grammar import compiler as compiler_module
from server.grammar.answer_check import checkable, is_linear, is_pattern, violation
from server.grammar.compiler import AnswerGrammar, GrammarCompiler
from server.grammar.llguidance import enforced
from server.grammar.schema_dialects import JSON_SCHEMA, OPENAPI
from server.wire.generation import GenerationConfig
from server.wire.message import parse

S = {"type": "string"}
UNIQUE = {"type": "object", "properties": {"tags": {"type": "array", "items": S, "uniqueItems": True}}}
SECONDS = 30.0


@pytest.fixture
async def compiler() -> AsyncIterator[GrammarCompiler]:
    made = GrammarCompiler(seconds=SECONDS, patience=SECONDS)
    yield made
    await made.close()


VIOLATIONS: list[tuple[Any, Any, tuple[str, str] | None]] = [
    (UNIQUE, {"tags": ["a", "b"]}, None),
    (UNIQUE, {"tags": ["a", "a"]}, ("uniqueItems", "tags")),
    ({"items": UNIQUE}, [{}, {"tags": ["a", "a"]}], ("uniqueItems", "[1].tags")),
    ({"properties": {"a b": UNIQUE}}, {"a b": {"tags": ["a", "a"]}}, ("uniqueItems", '["a b"].tags')),
    ({"not": {"type": "object"}}, {}, ("not", "")),
    ({"propertyNames": {"pattern": "^x"}}, {"y": 1}, ("propertyNames", "")),
    ({"if": {"required": ["a"]}, "then": {"required": ["b"]}}, {"a": 1}, ("required", "")),
    ({"contains": {"const": 1}, "minContains": 2}, [1], ("minContains", "")),
    ({"dependencies": {"a": ["b"]}}, {"a": 1}, ("dependentRequired", "")),
    ({"dependencies": {"a": {"required": ["b"]}}}, {"a": 1}, ("required", "")),
    ({"properties": {"a": S}, "unevaluatedProperties": False}, {"b": 1}, ("unevaluatedProperties", "")),
    ({"unevaluatedItems": False, "prefixItems": [S]}, ["a", 1], ("unevaluatedItems", "")),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, 1, ("oneOf", "")),
    ({"$ref": "#/definitions/a", "definitions": {"a": {"not": S}}}, "x", ("not", "")),
    ({"minProperties": 2}, {"a": 1}, ("minProperties", "")),
    ({"pattern": "\\bword\\b"}, "swords", ("pattern", "")),
    ({"format": "date"}, "no date", None),
]


@pytest.mark.parametrize(("schema", "value", "found"), VIOLATIONS)
def test_the_keyword_and_the_place(schema: Any, value: Any, found: tuple[str, str] | None) -> None:
    check, unchecked = checkable(schema, JSON_SCHEMA)
    assert unchecked == []
    assert violation(check, json.dumps(value)) == found


def test_a_schema_message_is_translated_as_its_grammar_is() -> None:
    schema = {
        "type": "OBJECT",
        "properties": {
            "a": {
                "type": "ARRAY",
                "minItems": "1",
                "items": {"type": "INTEGER", "format": "int64"},
                "unique_items": True,
            },
            "b": {"type": "STRING", "nullable": True},
            "c": {"oneOf": [{"type": "NUMBER"}, {"type": "INTEGER"}]},
        },
        "propertyOrdering": ["b", "a"],
    }
    check, _ = checkable(schema, OPENAPI)
    assert violation(check, '{"b": null, "a": [1], "c": 1}') is None
    assert violation(check, '{"b": 1, "a": [1]}') == ("anyOf", "b")
    assert violation(check, '{"a": []}') == ("minItems", "a")
    assert violation(check, '{"a": [1, 1]}') == ("uniqueItems", "a")


def test_patterns_that_cannot_be_matched_in_linear_time_are_not_checked() -> None:
    assert [is_linear(text) for text in ("^a+$", "(?=a)", "(a)\\1", "(")] == [True, False, False, False]
    assert [is_pattern(text) for text in ("^a+$", "(?=a)", "(a)\\1", "(")] == [True, True, True, False]
    schema = {
        "properties": {"a": {"pattern": "(?=x)"}, "b": {"pattern": "^y"}},
        "patternProperties": {"(?!a)": S},
        "additionalProperties": False,
    }
    check, unchecked = checkable(schema, JSON_SCHEMA)
    assert sorted(unchecked) == [".patternProperties", ".properties.a.pattern"]
    assert violation(check, '{"a": "", "c": 1}') is None
    assert violation(check, '{"b": "x"}') == ("pattern", "b")


def _keyword(name: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[Schema]:
    return values.map(lambda value: {name: value})


def _small() -> st.SearchStrategy[Schema]:
    """Small schemas with keywords that no grammar enforces."""
    leaves = st.sampled_from(
        [
            {},
            S,
            {"type": "integer"},
            {"type": "array"},
            {"minimum": 1},
            {"const": 1},
            {"required": ["a"]},
            {"maxLength": 1},
        ]
    )

    def nodes(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
        keywords = [
            *(_keyword(name, inner) for name in ("not", "contains", "if", "then", "else", "propertyNames")),
            *(_keyword(name, inner) for name in ("items", "additionalProperties", "unevaluatedItems")),
            *(
                _keyword(name, st.dictionaries(st.sampled_from("ab"), inner, max_size=2))
                for name in ("properties", "dependentSchemas")
            ),
            _keyword("oneOf", st.lists(inner, min_size=1, max_size=3)),
            _keyword("anyOf", st.lists(inner, min_size=1, max_size=3)),
            _keyword("uniqueItems", st.booleans()),
            _keyword("dependentRequired", st.just({"a": ["b"]})),
            _keyword("minContains", st.integers(0, 2)),
            _keyword("minProperties", st.integers(0, 2)),
            _keyword("unevaluatedProperties", st.just(False)),
        ]
        return st.lists(st.one_of(keywords), min_size=1, max_size=3).map(
            lambda found: {name: value for one in found for name, value in one.items()}
        )

    return st.recursive(leaves, nodes, max_leaves=4)


VALUES = st.recursive(
    st.sampled_from([None, True, 0, 1, 1.0, 2.5, "", "a", "ab"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(schema=_small(), value=VALUES)
def test_the_verdict_is_that_of_the_jsonschema_package(schema: Schema, value: Any) -> None:
    check, _ = checkable(schema, JSON_SCHEMA)
    errors = list(jsonschema.Draft202012Validator(schema).iter_errors(value))
    found = violation(check, json.dumps(value))
    assert (found is None) is (errors == [])
    if found is not None:
        places = {_place(error.absolute_path) for error in errors}
        named = {step for error in errors for step in (*error.absolute_schema_path, "properties")}
        assert found[0] in named
        assert found[1] in places


def _place(path: Any) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


async def answer_of(compiler: GrammarCompiler, schema: Any, **config: Any) -> AnswerGrammar:
    asked = {"responseMimeType": "application/json", "responseJsonSchema": schema, **config}
    grammar = await compiler.answer(parse(GenerationConfig, asked))
    assert grammar is not None
    return grammar


async def test_what_is_said_of_a_finished_answer(compiler: GrammarCompiler) -> None:
    grammar = await answer_of(compiler, UNIQUE)
    assert grammar.ignored == ("generationConfig.responseJsonSchema.properties.tags.uniqueItems",)
    assert await compiler.remark(grammar, '{"tags": ["a"]}', []) == ""
    said = await compiler.remark(grammar, '{"tags": ["a", "a"]}', [])
    assert said == 'The answer does not satisfy "uniqueItems" at tags.'
    assert await compiler.remark(grammar, '{"tags": ["a"', []) == "The answer is no complete JSON."
    choices = await answer_of(compiler, {"enum": ["a", "b"], "not": {"const": "b"}}, responseMimeType="text/x.enum")
    assert [await compiler.remark(choices, text, []) for text in "ab"] == ["", 'The answer does not satisfy "not".']


async def test_the_arguments_of_each_call_are_checked(compiler: GrammarCompiler) -> None:
    check, _ = checkable(UNIQUE, JSON_SCHEMA)
    grammar = AnswerGrammar("", call_checks={"f": check})
    calls = [ToolCall("1", "g", {"tags": [1, 1]}), ToolCall("2", "f", {"tags": ["a"]})]
    assert await compiler.remark(grammar, "", calls) == ""
    said = await compiler.remark(grammar, "", [*calls, ToolCall("3", "f", {"tags": ["a", "a"]})])
    assert said == 'The arguments of f do not satisfy "uniqueItems" at tags.'


def doubled(levels: int) -> Any:
    """Takes 2 to the power of ``levels`` steps to check."""
    pairs = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2, "not": {"const": 1}} for i in range(levels)}
    return {"$ref": "#/$defs/d0", "$defs": {**pairs, f"d{levels}": {"type": "boolean"}}}


async def test_a_check_that_takes_too_long_is_given_up() -> None:
    compiler = GrammarCompiler(seconds=1.0, patience=SECONDS, number=1)
    grammar = AnswerGrammar("", answer_check=checkable(doubled(60), JSON_SCHEMA)[0])
    async with asyncio.timeout(SECONDS):
        said = await compiler.remark(grammar, '"x"', [])
    assert said == "The answer was not checked: checking it takes too much."
    await compiler.close()


async def test_values_too_deep_for_the_check_say_so(compiler: GrammarCompiler) -> None:
    grammar = await answer_of(compiler, {"items": {"$ref": "#"}, "not": {"const": 1}})
    for levels in (500, 5_000, 200_000):
        said = await compiler.remark(grammar, "[" * levels + "]" * levels, [])
        assert said == "" or said.startswith("The answer was not checked")


@pytest.mark.parametrize(("job", "seconds"), [(hoarding, SECONDS), (sleeping, 5.0)])
async def test_a_check_that_cannot_be_made_fails_no_request(
    job: Any, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = GrammarCompiler(seconds=seconds, patience=SECONDS)
    monkeypatch.setattr(compiler_module, "checkable_all", job)
    grammar = await answer_of(compiler, UNIQUE)
    assert grammar.ignored == ("generationConfig.responseJsonSchema.properties.tags.uniqueItems (unchecked)",)
    assert not grammar.has_checks
    await compiler.close()


async def test_an_answer_that_waits_too_long_for_its_check_says_so(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = await answer_of(compiler, UNIQUE)

    async def busy(*_arguments: Any, **_more: Any) -> None:
        raise ResourceExhausted("busy")

    monkeypatch.setattr(compiler._children, "run", busy)
    assert await compiler.remark(grammar, "{}", []) == "The answer was not checked: too many are being checked."


def test_nothing_is_fetched() -> None:
    check, _ = checkable({"$schema": "http://localhost:1/x", "$id": "http://localhost:1/y", "not": S}, JSON_SCHEMA)
    assert "localhost" not in check
    assert enforced({"$schema": "http://localhost:1/x", "type": "string"}, "f", False)

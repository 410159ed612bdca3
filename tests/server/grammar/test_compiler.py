"""GenerationConfig to the grammar of its answers: forms, refusals, and schemas that are meant to hurt."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.child_jobs import hoarding, is_running, process, sleeping
from support.grammars import accepts

from server.convert.tools import Function, Tools
from server.errors import ApiError, InvalidArgument, ResourceExhausted
from server.families.table import CASTOR
from server.grammar import compiler as constraint_module
from server.grammar.compiler import AnswerGrammar, GrammarCompiler
from server.grammar.llguidance import accepted, repaired
from server.grammar.schema_dialects import PARAMETERS
from server.wire.generation import GenerationConfig
from server.wire.message import parse

S = {"type": "string"}
AS_JSON = {"responseMimeType": "application/json"}
AS_ENUM = {"responseMimeType": "text/x.enum"}
POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}, "required": ["x"]}
SECONDS = 30.0
"""Generous: what is cut off at once takes milliseconds, what is not takes for ever."""


@pytest.fixture
async def compiler() -> AsyncIterator[GrammarCompiler]:
    made = GrammarCompiler(seconds=SECONDS, patience=SECONDS)
    yield made
    await made.close()


async def grammar_of(compiler: GrammarCompiler, **config: Any) -> str:
    async with asyncio.timeout(SECONDS):
        grammar = await compiler.answer(parse(GenerationConfig, config))
    assert grammar is not None
    return grammar.text


FREE: list[dict[str, Any]] = [
    {},
    {"responseMimeType": "text/plain"},
    {"responseMimeType": "TEXT/PLAIN", "responseSchema": {}},
    {"responseFormat": {}},
    {"responseFormat": {"text": {"mimeType": "TEXT_PLAIN"}}},
]


@pytest.mark.parametrize("config", FREE)
async def test_free_text(compiler: GrammarCompiler, config: dict[str, Any]) -> None:
    assert await compiler.answer(parse(GenerationConfig, config)) is None


async def test_json_without_a_schema_is_any_json(compiler: GrammarCompiler) -> None:
    grammar = await grammar_of(compiler, **AS_JSON)
    for value in (None, 1.5, "x", [], {"a": [1, {"b": None}]}):
        assert accepts(grammar, json.dumps(value))
    assert not accepts(grammar, "Sure! {}")


SAME = [
    {**AS_JSON, "responseSchema": {"type": "OBJECT", "properties": POINT["properties"], "required": ["x"]}},
    {**AS_JSON, "responseJsonSchema": POINT},
    {**AS_JSON, "_responseJsonSchema": POINT},
    {"response_mime_type": "Application/JSON", "response_json_schema": POINT},
    {"responseFormat": {"text": {"mimeType": "APPLICATION_JSON", "schema": POINT}}},
    {**AS_JSON, "responseFormat": {"text": {"mimeType": 1, "schema": POINT}}},
]


@pytest.mark.parametrize("config", SAME)
async def test_a_schema_in_each_of_its_fields(compiler: GrammarCompiler, config: dict[str, Any]) -> None:
    grammar = await grammar_of(compiler, **config)
    assert accepts(grammar, '{"x": 1}')
    assert accepts(grammar, '{"x": 1, "y": -2}')
    for wrong in ('{"y": 1}', '{"x": "1"}', '{"x": 1, "z": 1}', '{"x":1}', '{"x": 1}\n', '{\n"x": 1}', "[]"):
        assert not accepts(grammar, wrong)


async def test_an_escaped_name_is_not_another_property(compiler: GrammarCompiler) -> None:
    schema = {"type": "object", "properties": {"a": S}, "additionalProperties": {"type": "integer"}}
    grammar = await grammar_of(compiler, **AS_JSON, responseJsonSchema=schema)
    assert accepts(grammar, '{"a": "x", "b": 1}')
    assert not accepts(grammar, '{"\\u0061": 1}')


async def test_choices_are_bare_texts(compiler: GrammarCompiler) -> None:
    choices = ["a", "ab", 'say "hi"', "line\nline", "é", "back\\slash"]
    for field in ("responseSchema", "responseJsonSchema"):
        grammar = await grammar_of(compiler, **AS_ENUM, **{field: {"type": "STRING", "enum": choices}})
        assert all(accepts(grammar, choice) for choice in choices)
        assert not accepts(grammar, '"a"')
        assert not accepts(grammar, "")


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"responseSchema": S}, "response_schema"),
    ({"responseJsonSchema": S}, "response_json_schema"),
    ({"responseMimeType": "text/plain", "responseSchema": S}, "response_schema"),
    ({**AS_JSON, "responseSchema": S, "responseJsonSchema": S}, "response_json_schema"),
    ({**AS_JSON, "responseSchema": S, "responseFormat": {"text": {"schema": S}}}, "response_format.text.schema"),
    ({**AS_JSON, "responseFormat": {"text": {"mimeType": "TEXT_PLAIN"}}}, "response_format.text.mime_type"),
    ({"responseFormat": {"text": {"schema": S}}}, "response_format.text.schema"),
    (AS_ENUM, "response_mime_type"),
    ({**AS_ENUM, "responseSchema": S}, "response_schema"),
    ({**AS_ENUM, "responseSchema": {"type": "STRING", "enum": ["a", ""]}}, "response_schema"),
    ({**AS_ENUM, "responseSchema": {"type": "INTEGER", "enum": [1]}}, "response_schema"),
]


@pytest.mark.parametrize(("config", "field"), CONTRADICTIONS)
async def test_contradictions(compiler: GrammarCompiler, config: dict[str, Any], field: str) -> None:
    assert await refused(compiler, config) == f"generation_config.{field}"


def pattern(text: str) -> dict[str, Any]:
    return {"type": "string", "pattern": text}


HELD_BACK: list[tuple[Any, str]] = [
    (pattern("("), ".pattern"),
    ({"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 2, "maximum": 1}}, ".items"),
    ({"type": "string", "enum": [1]}, ""),
    ({"enum": ["\x01"]}, ".enum"),
]


@pytest.mark.parametrize(("schema", "path"), HELD_BACK)
async def test_what_no_value_can_match_is_refused_by_its_path(
    compiler: GrammarCompiler, schema: Any, path: str
) -> None:
    field = await refused(compiler, {**AS_JSON, "responseJsonSchema": schema})
    assert field == f"generation_config.response_json_schema{path}"


LEFT_TO_THE_CHECK: list[tuple[Any, str]] = [
    ({"properties": {"a": {"items": pattern("(?=a)b")}}}, ".properties.a.items.pattern (unchecked)"),
    ({"properties": {"a": pattern("(a)\\1")}}, ".properties.a.pattern (unchecked)"),
    ({"$defs": {"A": {"items": pattern("a^b")}}, "properties": {"a": {"$ref": "#/$defs/A"}}}, ".$defs.A.items.pattern"),
    (pattern("\\bword\\b"), ".pattern"),
    ({"items": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}, ".items.oneOf"),
    ({"items": {"maxProperties": 1, "anyOf": [{"properties": {"a": S, "b": S}}]}}, ".items.maxProperties"),
    ({"properties": {"a": S, "b": S, "c": S}, "maxProperties": 2}, ".maxProperties"),
    ({"patternProperties": {"^x": S, "^xy": S}}, ".patternProperties"),
    ({"patternProperties": {"^(?=x)": S}, "additionalProperties": False}, ".patternProperties (unchecked)"),
    ({"uniqueItems": True}, ".uniqueItems"),
    (pattern("a" * 4097), ".pattern"),
    ({"type": "integer", "multipleOf": 1000003}, ".multipleOf"),
    ({"format": "idn-email"}, ".format (unchecked)"),
]


@pytest.mark.parametrize(("schema", "path"), LEFT_TO_THE_CHECK)
async def test_what_llguidance_cannot_enforce_is_left_to_the_check(
    compiler: GrammarCompiler, schema: Any, path: str
) -> None:
    grammar = await schema_of(compiler, schema)
    assert grammar.ignored == (f"generationConfig.responseJsonSchema{path}",)
    assert bool(grammar.answer_check) is not path.endswith("(unchecked)")
    with pytest.raises(InvalidArgument) as caught:
        await schema_of(compiler, schema, strict=True)
    [violation] = caught.value.violations
    assert violation.field == "generation_config.response_json_schema" + path.removesuffix(" (unchecked)")
    assert violation.description.endswith("cannot be enforced; leave it out, or check the answer yourself")


def nested(levels: int) -> Any:
    schema: Any = S
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def chain(links: int) -> Any:
    definitions = {
        f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(links)
    }
    return {"$defs": {**definitions, f"d{links}": S}, "$ref": "#/$defs/d0"}


def exploding(parts: int) -> Any:
    """2 to the power of ``parts`` combinations."""
    pair = [[{"type": "object", "properties": {f"{name}{i}": S}} for name in "ab"] for i in range(parts)]
    return {"allOf": [{"anyOf": choice} for choice in pair]}


def laid_over(levels: int) -> Any:
    """A text that has to match as many patterns as there are levels."""
    schema: Any = S
    for level in range(levels):
        schema = {"pattern": f"a{level}", "anyOf": [schema]}
    return schema


BOMBS = {
    "deep": nested(90_000),
    "chained": chain(3000),
    "combinations": exploding(24),
    "repeats": pattern("^((a{1000}){1000})$"),
    "many patterns": {"allOf": [pattern(f"a{i}.*b") for i in range(60)]},
    "huge enum": {"enum": [f"value {i}" for i in range(100_000)]},
    "huge pattern": pattern("a" * 1_000_000),
    "nested groups": pattern("(" * 5000 + "a" + ")" * 5000),
    "endless": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "overlapping": {"patternProperties": {f"^a{i}.*b": S for i in range(300)}, "type": "object"},
    "megabyte": {"properties": {f"property {i}": {"type": "string", "description": "x" * 80} for i in range(9000)}},
}


WEAKENED = ("combinations", "repeats", "many patterns", "nested groups", "overlapping")


@pytest.mark.parametrize("name", BOMBS)
async def test_schemas_that_hurt_are_refused_or_weakened_and_never_hang(compiler: GrammarCompiler, name: str) -> None:
    if name in WEAKENED:
        grammar = await schema_of(compiler, BOMBS[name])
        assert grammar.ignored[0].startswith("generationConfig.responseJsonSchema.")
    else:
        path = await refused(compiler, {**AS_JSON, "responseJsonSchema": BOMBS[name]})
        assert path.startswith("generation_config.response_json_schema")


HARMLESS = {
    "alternatives": pattern("|".join(f"a{i}" for i in range(800))),
    "backtracking": pattern("^(a+)+$"),
    "long": {"type": "string", "minLength": 10**6, "maxLength": 10**9},
    "many items": {"type": "array", "items": S, "minItems": 10**6},
    "many choices": {"enum": [f"value {i}" for i in range(5000)]},
    "many properties": {"type": "object", "properties": {f"p{i}": S for i in range(2000)}},
    "recursive": {"type": "object", "properties": {"a": {"type": "array", "items": {"$ref": "#"}}}},
}


@pytest.mark.parametrize("name", HARMLESS)
async def test_schemas_that_look_as_if_they_hurt_compile(compiler: GrammarCompiler, name: str) -> None:
    assert await grammar_of(compiler, **AS_JSON, responseJsonSchema=HARMLESS[name])


NUMBERS: dict[str, tuple[Any, str]] = {
    "large": ({"multipleOf": 2147483647}, ".multipleOf"),
    "prime": ({"type": "integer", "multipleOf": 1000003}, ".multipleOf"),
    "decimals": ({"properties": {"a": {"type": "number", "multipleOf": 0.1234567}}}, ".properties.a.multipleOf"),
    "laid over": ({"allOf": [{"multipleOf": divisor} for divisor in (101, 103, 107)]}, ".allOf[2].multipleOf"),
    "by reference": ({"$defs": {"A": {"multipleOf": 9973}}, "$ref": "#/$defs/A", "multipleOf": 101}, ".multipleOf"),
    "by choice": ({"multipleOf": 9973, "anyOf": [{"multipleOf": 101}, {"multipleOf": 103}]}, ".multipleOf"),
    "brackets": (pattern("[" * 190_000), ".pattern (unchecked)"),
    "groups": (pattern("(?‹" * 60_000), ".pattern (unchecked)"),
    "4 kB and one": (pattern("a" * 4097), ".pattern"),
    "property": ({"type": "object", "patternProperties": {"[" * 5000: S}}, ".patternProperties (unchecked)"),
    "chained choices": (laid_over(12), ".pattern"),
}


@pytest.mark.parametrize("name", NUMBERS)
async def test_what_is_known_to_cost_too_much_is_left_to_the_check(compiler: GrammarCompiler, name: str) -> None:
    schema, path = NUMBERS[name]
    grammar = await schema_of(compiler, schema)
    assert f"generationConfig.responseJsonSchema{path}" in grammar.ignored


@pytest.mark.parametrize(("limit", "value"), [("minimum", 10**3999), ("maximum", "-" + "9" * 3999)])
async def test_numbers_beyond_all_reading_are_refused(compiler: GrammarCompiler, limit: str, value: Any) -> None:
    schema = {"type": "integer", limit: value}
    assert (await refused(compiler, {**AS_JSON, "responseJsonSchema": schema})).endswith(f".{limit}")


@pytest.mark.parametrize(
    "schema",
    [
        *({"type": "integer", "multipleOf": divisor} for divisor in (5, 100, 3600, 86_400, 10**6, 65_536)),
        *({"type": "number", "multipleOf": divisor} for divisor in (0.01, 0.5, 1e-6, 2.5)),
        {"allOf": [{"multipleOf": 4}, {"multipleOf": 6}, {"multipleOf": 100}]},
        {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
        {"type": "integer", "exclusiveMinimum": -(10**30)},
        pattern("[" + "a" * 4000 + "]"),
    ],
    ids=str,
)
async def test_usual_numbers_compile(compiler: GrammarCompiler, schema: Any) -> None:
    assert await grammar_of(compiler, **AS_JSON, responseJsonSchema=schema)


async def test_what_takes_too_long_is_killed_and_the_next_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(seconds=1.0, number=1)
    pid = await compiler._children.run(process, owner="", seconds=SECONDS, patience=SECONDS)
    with monkeypatch.context() as patch:
        patch.setattr(constraint_module, "enforced", sleeping)
        with pytest.raises(InvalidArgument, match=r"response_json_schema: compiling it takes more than 1 seconds"):
            await schema_of(compiler, POINT)
    assert not is_running(pid)
    compiler._seconds = SECONDS
    assert await schema_of(compiler, POINT)
    await compiler.close()


async def test_what_takes_too_much_memory_is_refused(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(constraint_module, "enforced", hoarding)
        with pytest.raises(InvalidArgument, match="compiling it takes more than 256 MiB of memory"):
            await schema_of(compiler, POINT)
    assert await schema_of(compiler, POINT)


async def test_callers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with many slow schemas keeps another waiting for one of them, not for all."""
    compiler = GrammarCompiler(seconds=2.0, patience=SECONDS, number=1)
    monkeypatch.setattr(constraint_module, "enforced", sleeping)
    many = [asyncio.create_task(schema_of(compiler, {"const": i}, "busy")) for i in range(6)]
    await asyncio.sleep(0.1)
    monkeypatch.undo()
    assert await schema_of(compiler, POINT, "other")
    ended = [task for task in many if task.done()]
    assert len(ended) <= 2
    for task in many:
        task.cancel()
    outcomes = await asyncio.gather(*many, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {InvalidArgument, ResourceExhausted, asyncio.CancelledError}
    await compiler.close()


async def test_refusals_are_remembered_for_each_field(compiler: GrammarCompiler) -> None:
    for field in ("responseJsonSchema", "responseFormat", "responseJsonSchema"):
        given = {"not": 1} if field == "responseJsonSchema" else {"text": {"schema": {"not": 1}}}
        config = AS_JSON if field == "responseJsonSchema" else {"responseMimeType": "application/json"}
        path = await refused(compiler, {**config, field: given})
        assert path.endswith("schema.not")
        assert path.startswith("generation_config.response_" + field.removeprefix("response").lower()[:4])


async def test_a_caller_who_leaves_takes_nothing_from_the_others(compiler: GrammarCompiler) -> None:
    calls = [asyncio.create_task(schema_of(compiler, exploding(8))) for _ in range(3)]
    await asyncio.sleep(0)
    calls[0].cancel()
    async with asyncio.timeout(SECONDS):
        left, *stayed = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(left, asyncio.CancelledError)
    assert stayed[0] == stayed[1]
    assert isinstance(stayed[0], AnswerGrammar)


def test_grammars_of_ours_are_checked() -> None:
    lark = json.dumps({"grammars": [{"lark_grammar": 'start: "a" <[7]>'}]})
    assert accepted(lark, "f") == lark
    for wrong in ("start: nothing", "{}", "x" * 2_000_000):
        with pytest.raises(InvalidArgument) as caught:
            accepted(wrong, "tools")
        assert caught.value.violations[0].field == "tools"


def test_repaired_schemas_compile() -> None:
    parameters = {
        "type": "OBJECT",
        "properties": {
            "a": {"type": "STRING", "pattern": "(?=x)y", "description": "d"},
            "b": {"type": "ARRAY", "items": {"type": "INTEGER", "minimum": 5, "maximum": 1}},
            "c": {"type": "INTEGER", "maximum": 3},
            "d": {"type": "INTEGER", "multipleOf": 2147483647},
        },
        "required": ["a"],
    }
    document, unenforced = repaired(parameters, PARAMETERS, time.process_time() + SECONDS)
    assert unenforced == {".properties.a.pattern": True, ".properties.d.multipleOf": True}
    assert document["properties"] == {
        "a": S,
        "b": {"type": "array", "items": {"type": "integer", "minimum": 5, "maximum": 1}},
        "c": {"type": "integer", "maximum": 3},
        "d": {"type": "integer"},
    }


TOO_LARGE = ("deep", "huge enum", "huge pattern", "megabyte")


@pytest.mark.parametrize("name", [name for name in BOMBS if name not in TOO_LARGE])
async def test_bombs_in_parameters_relax(compiler: GrammarCompiler, name: str) -> None:
    tools = Tools((), (Function("f", parameters=BOMBS[name]), Function("g", parameters=POINT)), must_call=True)
    async with asyncio.timeout(SECONDS):
        assert "call_1" in (await compiler.calls(tools, CASTOR, {})).text


def test_the_server_needs_no_torch_for_grammars() -> None:
    code = (
        "import sys\n"
        "from server.grammar.llguidance import enforced\n"
        "import server.app, server.offload.child\n"
        "assert enforced({'type': 'string'}, 'f', False)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


async def refused(compiler: GrammarCompiler, config: dict[str, Any]) -> str:
    """The path of the problem."""
    with pytest.raises(ApiError) as caught:
        await grammar_of(compiler, **config)
    assert isinstance(caught.value, InvalidArgument)
    return caught.value.violations[0].field


async def schema_of(compiler: GrammarCompiler, schema: Any, owner: str = "", strict: bool = False) -> AnswerGrammar:
    config = parse(GenerationConfig, {**AS_JSON, "responseJsonSchema": schema})
    grammar = await compiler.answer(config, owner, strict)
    assert grammar is not None
    return grammar

"""GenerationConfig to the grammar of its answers: forms, refusals, and schemas that are meant to hurt."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support.grammars import accepts

from server.convert import constraint as constraint_module
from server.convert.constraint import GrammarCompiler, answer_grammar
from server.errors import ApiError, InvalidArgument, ResourceExhausted
from server.wire.generation import GenerationConfig
from server.wire.message import parse

S = {"type": "string"}
AS_JSON = {"responseMimeType": "application/json"}
AS_ENUM = {"responseMimeType": "text/x.enum"}
POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}, "required": ["x"]}
SECONDS = 30.0
"""Generous: what is cut off at once takes milliseconds, what is not takes for ever."""


@pytest.fixture
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler()
    yield made
    made.close()


async def grammar_of(compiler: GrammarCompiler, **config: Any) -> str:
    async with asyncio.timeout(SECONDS):
        grammar = await answer_grammar(parse(GenerationConfig, config), compiler)
    assert grammar is not None
    return grammar


FREE: list[dict[str, Any]] = [
    {},
    {"responseMimeType": "text/plain"},
    {"responseMimeType": "TEXT/PLAIN", "responseSchema": {}},
    {"responseFormat": {}},
    {"responseFormat": {"text": {"mimeType": "TEXT_PLAIN"}}},
]


@pytest.mark.parametrize("config", FREE)
async def test_free_text(compiler: GrammarCompiler, config: dict[str, Any]) -> None:
    assert await answer_grammar(parse(GenerationConfig, config), compiler) is None


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
    ({"properties": {"a": {"items": pattern("(?=a)b")}}}, ".properties.a.items.pattern"),
    ({"properties": {"a": pattern("(a)\\1")}}, ".properties.a.pattern"),
    ({"$defs": {"A": {"items": pattern("a^b")}}, "properties": {"a": {"$ref": "#/$defs/A"}}}, ".$defs.A.items.pattern"),
    (pattern("("), ".pattern"),
    ({"items": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}, ".items.oneOf"),
    ({"items": {"maxProperties": 1, "anyOf": [{"properties": {"a": S, "b": S}}]}}, ".items"),
    ({"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 2, "maximum": 1}}, ".items"),
    ({"type": "string", "enum": [1]}, ""),
    ({"enum": ["\x01"]}, ".enum"),
]


@pytest.mark.parametrize(("schema", "path"), HELD_BACK)
async def test_what_llguidance_cannot_enforce_is_named_by_its_path(
    compiler: GrammarCompiler, schema: Any, path: str
) -> None:
    field = await refused(compiler, {**AS_JSON, "responseJsonSchema": schema})
    assert field == f"generation_config.response_json_schema{path}"


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


@pytest.mark.parametrize("name", BOMBS)
async def test_schemas_that_hurt_are_refused_and_never_hang(compiler: GrammarCompiler, name: str) -> None:
    path = await refused(compiler, {**AS_JSON, "responseJsonSchema": BOMBS[name]})
    assert path.startswith("generation_config.response_json_schema")


HARMLESS = {
    "alternatives": pattern("|".join(f"a{i}" for i in range(3000))),
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


async def test_who_waits_too_long_is_refused_and_the_thread_finishes(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    enforce = constraint_module._enforced

    def held(*job: Any) -> str:
        assert released.wait(SECONDS)
        return enforce(*job)

    monkeypatch.setattr(constraint_module, "_enforced", held)
    compiler = GrammarCompiler(threads=1, deadline=2.0)  # by then the thread has begun, also on a busy machine
    slow, config = {"items": S}, {**AS_JSON, "responseJsonSchema": {"items": S}}
    with pytest.raises(InvalidArgument, match="takes more than"):
        await compiler.schema(slow, "f", openapi=False)
    with pytest.raises(ResourceExhausted):  # it never began: that is not the schema's fault
        await answer_grammar(parse(GenerationConfig, config), compiler)
    assert await compiler.relaxed(slow) == {"type": "object"}
    released.set()
    async with asyncio.timeout(SECONDS):
        while not await finished(compiler, slow):
            await asyncio.sleep(0.02)
    compiler.close()


async def finished(compiler: GrammarCompiler, schema: Any) -> bool:
    """Whether the result is there at once."""
    try:
        return bool(await compiler.schema(schema, "f", openapi=False))
    except InvalidArgument:
        return False


async def test_refusals_are_remembered_for_each_field(compiler: GrammarCompiler) -> None:
    for field in ("one", "two", "one"):
        with pytest.raises(InvalidArgument) as caught:
            await compiler.schema({"not": S}, field, openapi=False)
        assert caught.value.violations[0].field == f"{field}.not"


async def test_a_caller_who_leaves_takes_nothing_from_the_others(compiler: GrammarCompiler) -> None:
    calls = [asyncio.create_task(compiler.schema(exploding(8), "f", openapi=False)) for _ in range(3)]
    await asyncio.sleep(0)
    calls[0].cancel()
    async with asyncio.timeout(SECONDS):
        left, *stayed = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(left, asyncio.CancelledError)
    assert stayed[0] == stayed[1]
    assert isinstance(stayed[0], str)


async def test_grammars_of_others_are_checked(compiler: GrammarCompiler) -> None:
    lark = json.dumps({"grammars": [{"lark_grammar": 'start: "a" <[7]>'}]})
    assert await compiler.compile(lark, "f") == lark
    for wrong in ("start: nothing", "{}", "x" * 2_000_000):
        with pytest.raises(InvalidArgument) as caught:
            await compiler.compile(wrong, "tools")
        assert caught.value.violations[0].field == "tools"


async def test_relaxed_schemas_compile(compiler: GrammarCompiler) -> None:
    parameters = {
        "type": "OBJECT",
        "properties": {
            "a": {"type": "STRING", "pattern": "(?=x)y", "description": "d"},
            "b": {"type": "ARRAY", "items": {"type": "INTEGER", "minimum": 5, "maximum": 1}},
            "c": {"type": "INTEGER", "maximum": 3},
        },
        "required": ["a"],
    }
    properties = (await compiler.relaxed(parameters))["properties"]
    assert properties == {
        "a": S,
        "b": {"type": "array", "items": {"type": "integer", "minimum": 5, "maximum": 1}},
        "c": {"type": "integer", "maximum": 3},
    }


async def test_bombs_in_parameters_relax(compiler: GrammarCompiler) -> None:
    async with asyncio.timeout(SECONDS):
        for bomb in BOMBS.values():
            assert (await compiler.relaxed(bomb))["type"] == "object"


def test_the_server_needs_no_torch_for_grammars() -> None:
    code = (
        "import asyncio, sys\n"
        "from server.convert.constraint import GrammarCompiler\n"
        "compiler = GrammarCompiler()\n"
        "assert asyncio.run(compiler.schema({'type': 'string'}, 'f', openapi=False))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


async def refused(compiler: GrammarCompiler, config: dict[str, Any]) -> str:
    """The path of the problem."""
    with pytest.raises(ApiError) as caught:
        await grammar_of(compiler, **config)
    assert isinstance(caught.value, InvalidArgument)
    return caught.value.violations[0].field

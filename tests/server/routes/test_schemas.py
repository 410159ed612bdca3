"""Schemas that grammars cannot enforce: named in a header and checked afterwards, or refused if operators say so."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fakes import INFO, Harness, events_of, saying, serving
from support.templates import template_folder

from engine.api.events import FinishReason
from server.config.models_file import ModelSpec

S = {"type": "string"}
TAGS = {"type": "object", "properties": {"tags": {"type": "array", "items": S, "uniqueItems": True}}}
RIGHT, WRONG = '{"tags": ["a", "b"]}', '{"tags": ["a", "a"]}'
SAID = 'The answer does not satisfy "uniqueItems" at tags.'
PATH = "generationConfig.responseJsonSchema.properties.tags.uniqueItems"
MCP_TOOL = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "additionalProperties": False,
    "$defs": {"Opt": S},
    "properties": {
        "minutes": {"type": "integer", "enum": [60, 1440], "$comment": "x", "enumDescriptions": ["a", "b"]},
        "tags": {"type": ["null", "array"], "items": {"$ref": "#/$defs/Opt", "description": "d"}, "uniqueItems": True},
        "kind": {"oneOf": [{"const": "a"}, {"const": "b"}]},
        "map": {"type": "object", "propertyNames": {"pattern": "^x"}, "additionalProperties": S},
    },
}


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    async with serving(template_folder(tmp_path / "model", "Qwen2.5")) as serving_harness:
        serving_harness.engine.info = replace(INFO, max_context=8192, vocab_size=400)
        yield serving_harness


def asking(schema: Any = TAGS, field: str = "responseJsonSchema", **config: Any) -> dict[str, Any]:
    return {"contents": "?", "generationConfig": {"responseMimeType": "application/json", field: schema, **config}}


def calling(parameters: Any, field: str = "parameters", **more: Any) -> dict[str, Any]:
    return {"contents": "?", "tools": [{"functionDeclarations": [{"name": "f", field: parameters}]}], **more}


def call(arguments: str) -> str:
    return f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'


async def test_what_is_not_enforced_is_named_and_checked(harness: Harness) -> None:
    harness.engine.answers += [saying(WRONG), saying(RIGHT)]
    wrong, right = await harness.generate(asking()), await harness.generate(asking())
    assert wrong.headers["x-castor-ignored"] == right.headers["x-castor-ignored"] == PATH
    [candidate] = wrong.json()["candidates"]
    assert (candidate["finishReason"], candidate["finishMessage"]) == ("STOP", SAID)
    assert candidate["content"]["parts"] == [{"text": WRONG}]
    assert "finishMessage" not in right.json()["candidates"][0]


async def test_a_stream_says_it_in_its_last_chunk(harness: Harness) -> None:
    harness.engine.answers.append(saying(WRONG))
    streamed = await harness.stream(asking(responseLogprobs=True, candidateCount=2))
    assert streamed.headers["x-castor-ignored"] == PATH
    for index in range(2):
        chunks = [c for event in events_of(streamed.text) for c in event["candidates"] if c["index"] == index]
        assert [chunk.get("finishMessage") for chunk in chunks] == [None] * (len(chunks) - 1) + [SAID]
        assert chunks[-1]["finishReason"] == "STOP"


async def test_an_answer_that_was_cut_off_is_not_checked(harness: Harness) -> None:
    harness.engine.answers.append(saying('{"tags": ["a", "a"', reason=FinishReason.MAX_TOKENS))
    [candidate] = (await harness.generate(asking())).json()["candidates"]
    assert candidate["finishReason"] == "MAX_TOKENS"
    assert "finishMessage" not in candidate


@pytest.mark.parametrize("field", ["parameters", "parametersJsonSchema"])
async def test_tools_as_mcp_servers_write_them(harness: Harness, field: str) -> None:
    harness.engine.answers += [saying(call('{"tags": ["a", "a"], "map": {}}')), saying(call('{"map": {"y": "z"}}'))]
    answers = [await harness.generate(calling(MCP_TOOL, field)) for _ in range(2)]
    at = f"tools[0].functionDeclarations[0].{field}.properties"
    for answer, keyword, place in zip(answers, ("uniqueItems", "propertyNames"), ("tags", "map"), strict=True):
        assert answer.headers["x-castor-ignored"] == f"{at}.tags.uniqueItems, {at}.map.propertyNames"
        [candidate] = answer.json()["candidates"]
        assert "functionCall" in candidate["content"]["parts"][0]
        assert candidate["finishReason"] == "STOP"
        assert candidate["finishMessage"] == f'The arguments of f do not satisfy "{keyword}" at {place}.'


async def test_unions_as_sdks_write_them_are_no_matter(harness: Harness) -> None:
    union = {"type": "OBJECT", "properties": {"u": {"oneOf": [{"type": "NUMBER"}, {"type": "INTEGER"}]}}}
    harness.engine.answers.append(saying('{"u": 1}'))
    answer = await harness.generate(asking(union, "responseSchema"))
    assert answer.status_code == 200
    assert "x-castor-ignored" not in answer.headers
    assert "finishMessage" not in answer.json()["candidates"][0]
    harness.engine.answers.append(saying('{"u": 1}'))
    strict = await harness.generate(asking({"properties": {"u": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}}))
    assert strict.headers["x-castor-ignored"] == "generationConfig.responseJsonSchema.properties.u.oneOf"
    assert strict.json()["candidates"][0]["finishMessage"] == 'The answer does not satisfy "oneOf" at u.'


@pytest.mark.parametrize(
    ("schema", "field"),
    [
        ({"properties": {"a": {"type": "text"}}}, "properties.a.type"),
        ({"not": {"$ref": "https://example.com/x"}}, "not.$ref"),
        ({"pattern": "("}, "pattern"),
    ],
)
async def test_what_is_no_schema_is_still_refused(harness: Harness, schema: Any, field: str) -> None:
    response = await harness.generate(asking(schema))
    assert response.status_code == 400
    [problem] = response.json()["error"]["details"][0]["fieldViolations"]
    assert problem["field"] == f"generation_config.response_json_schema.{field}"


async def test_an_operator_may_refuse_what_cannot_be_enforced(tmp_path: Path) -> None:
    folder = template_folder(tmp_path / "model", "Qwen2.5")
    async with serving(folder, [ModelSpec("tiny", str(folder), strict_schemas=True)]) as harness:
        harness.engine.info = replace(INFO, max_context=8192, vocab_size=400)
        for body, place in (
            (asking(), "generation_config.response_json_schema.properties.tags.uniqueItems"),
            (calling(TAGS), "tools[0].function_declarations[0].parameters.properties.tags.uniqueItems"),
        ):
            response = await harness.generate(body)
            assert response.status_code == 400
            assert response.json()["error"]["message"] == (
                f"{place}: cannot be enforced; leave it out, or check the answer yourself"
            )
        assert (await harness.generate(asking({"type": "boolean"}))).status_code == 200


async def test_the_header_names_the_first_and_counts_the_rest(harness: Harness) -> None:
    schema = {"type": "object", "properties": {f"name {index} é": {"not": S} for index in range(300)}}
    named = (await harness.generate(asking(schema))).headers["x-castor-ignored"]
    *paths, last = named.split(", ")
    assert len(named) <= 4096
    assert paths[0] == 'generationConfig.responseJsonSchema.properties["name 0 \\u00e9"].not'
    assert last == f"and {300 - len(paths)} more"
    metrics = (await harness.client.get("/metrics")).text
    assert 'castor_ignored_fields_total{field="generationConfig.responseJsonSchema"} 1.0' in metrics


BOTH = {
    **calling({"type": "object", "properties": {"a": {"type": "integer"}}}),
    "generationConfig": {"responseMimeType": "application/json", "responseJsonSchema": TAGS},
}


async def test_a_model_may_call_or_answer_by_the_schema(harness: Harness) -> None:
    harness.engine.answers += [saying(WRONG), saying(call('{"a": 1}')), saying(json.dumps({"tags": [call("{}")]}))]
    answered, called, quoted = [await harness.generate(BOTH) for _ in range(3)]
    assert answered.headers["x-castor-ignored"] == called.headers["x-castor-ignored"] == PATH
    assert answered.json()["candidates"][0]["content"]["parts"] == [{"text": WRONG}]
    assert answered.json()["candidates"][0]["finishMessage"] == SAID
    [candidate] = called.json()["candidates"]
    assert candidate["content"]["parts"][0]["functionCall"]["args"] == {"a": 1}
    assert "finishMessage" not in candidate
    [part] = quoted.json()["candidates"][0]["content"]["parts"]
    assert json.loads(part["text"]) == {"tags": [call("{}")]}
    grammar = json.loads(harness.engine.requests[0].sampling.grammar or "")
    assert [one.get("name") for one in grammar["grammars"]] == [None, "answer"]


async def test_a_stream_of_both(harness: Harness) -> None:
    harness.engine.answers += [saying(RIGHT), saying(call('{"a": 1}'))]
    answered, called = [events_of((await harness.stream(BOTH)).text) for _ in range(2)]
    texts = [part["text"] for event in answered for part in event["candidates"][0]["content"]["parts"]]
    assert "".join(texts) == RIGHT
    calls = [part for event in called for part in event["candidates"][0]["content"]["parts"] if "functionCall" in part]
    assert [part["functionCall"]["args"] for part in calls] == [{"a": 1}]


@pytest.mark.parametrize("mode", ["ANY", "NONE", "VALIDATED"])
async def test_the_mode_decides_what_comes_beside_a_schema(harness: Harness, mode: str) -> None:
    config = {"toolConfig": {"functionCallingConfig": {"mode": mode}}}
    answer = await harness.generate({**BOTH, **config})
    ignored = answer.headers.get("x-castor-ignored")
    grammars = json.loads(harness.engine.requests[0].sampling.grammar or "")["grammars"]
    if mode == "ANY":
        assert ignored == "generationConfig.responseJsonSchema"
        assert [list(one) for one in grammars] == [["lark_grammar"]]
    elif mode == "NONE":
        assert ignored == PATH
        assert [list(one) for one in grammars] == [["json_schema"]]
    else:
        assert len(grammars) == 2

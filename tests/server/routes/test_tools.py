"""Function calling through the whole front end: what the engine is asked for, and what becomes of its answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fakes import INFO, Harness, events_of, saying, serving
from support.templates import template_folder

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ADD = {"name": "add", "parameters": {"type": "OBJECT", "properties": {"a": {"type": "INTEGER"}}}}
BODY: dict[str, Any] = {"contents": "How much is it?", "tools": [{"functionDeclarations": [ADD]}]}


@pytest.fixture(params=["Qwen2.5", "Phi-3.5"], ids=["native tools", "own prompt"])
async def harness(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Harness]:
    async with serving(template_folder(tmp_path / "model", request.param)) as serving_harness:
        serving_harness.engine.info = replace(INFO, max_context=8192, vocab_size=400)
        yield serving_harness


async def test_a_call_and_its_result(harness: Harness) -> None:
    harness.engine.answers.append(saying(f"I add.\n{CALL}"))
    candidate = (await harness.generate(BODY)).json()["candidates"][0]
    text, part = candidate["content"]["parts"]
    assert text == {"text": "I add."}
    assert part["functionCall"]["name"] == "add"
    assert part["functionCall"]["args"] == {"a": 1}
    assert part["functionCall"]["id"]
    answer = {"functionResponse": {"name": "add", "id": part["functionCall"]["id"], "response": {"result": 4711}}}
    contents = [{"parts": [{"text": "How much is it?"}]}, candidate["content"], {"parts": [answer]}]
    response = await harness.generate({**BODY, "contents": contents})
    assert response.json()["candidates"][0]["content"]["parts"] == [{"text": "ok"}]
    first, second = harness.engine.requests
    assert len(second.prompt) > len(first.prompt) + len(CALL)


async def test_what_the_engine_is_asked_for(harness: Harness) -> None:
    await harness.generate({**BODY, "generationConfig": {"stopSequences": ["}"]}})
    sampling = harness.engine.requests[0].sampling
    assert json.loads(sampling.grammar or "{}")["grammars"]
    assert sampling.stop_exempt == (("<tool_call>", "</tool_call>"),)
    await harness.generate({**BODY, "toolConfig": {"functionCallingConfig": {"mode": "NONE"}}})
    sampling = harness.engine.requests[1].sampling
    assert (sampling.grammar, sampling.stop_exempt, sampling.markers) == (None, (), ())


async def test_none_shows_a_call_as_the_text_it_is(harness: Harness) -> None:
    harness.engine.answers.append(saying(CALL))
    answer = await harness.generate({**BODY, "toolConfig": {"functionCallingConfig": {"mode": "NONE"}}})
    assert answer.json()["candidates"][0]["content"]["parts"] == [{"text": CALL}]


async def test_a_stream_tells_a_call_once_and_whole(harness: Harness) -> None:
    harness.engine.answers.append(saying(f"I add.\n{CALL}"))
    chunks = events_of((await harness.stream(BODY)).text)
    parts = [part for chunk in chunks for part in chunk["candidates"][0]["content"]["parts"]]
    assert "".join(part.get("text", "") for part in parts).strip() == "I add."
    assert [part["functionCall"]["args"] for part in parts if "functionCall" in part] == [{"a": 1}]


async def test_count_tokens_counts_what_would_be_sent(harness: Harness) -> None:
    usage = (await harness.generate(BODY)).json()["usageMetadata"]
    for counted in (BODY, {"generateContentRequest": {"model": "models/tiny", **BODY}}):
        assert (await harness.count(counted)).json()["totalTokens"] == usage["promptTokenCount"]
    assert (await harness.count({"contents": BODY["contents"]})).json()["totalTokens"] < usage["promptTokenCount"]


@pytest.mark.parametrize(
    "tools",
    [
        [{"functionDeclarations": [{"name": "f", "parameters": {"type": "object", "properties": {"a": True}}}]}],
        [
            {
                "functionDeclarations": [
                    {"name": "f", "parameters": {"properties": {"a": {"type": "object", "items": 1}}}}
                ]
            }
        ],
        [{"functionDeclarations": [{"name": "f", "parameters": {"properties": [1]}, "response": {"type": 99}}]}],
        [{"functionDeclarations": [{"name": "f", "parametersJsonSchema": {"$ref": "#/x", "pattern": "("}}]}],
    ],
)
async def test_strange_schemas_are_no_failure_of_ours(harness: Harness, tools: Any) -> None:
    response = await harness.generate({**BODY, "tools": tools})
    assert response.status_code in (200, 400), response.text

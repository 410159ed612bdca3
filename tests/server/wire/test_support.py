"""The walker: refuses what is set and not served, names what has no effect, lets defaults pass."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from server.errors import InvalidArgument, Unimplemented
from server.wire import content, generation, requests, tools
from server.wire.message import Message, parse
from server.wire.requests import CountTokensRequest, GenerateContentRequest
from server.wire.support import camel, review, supports

MESSAGES = [
    kind
    for module in (content, generation, requests, tools)
    for _, kind in inspect.getmembers(module, inspect.isclass)
    if issubclass(kind, Message) and kind.__module__ == module.__name__
]


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_field_says_what_happens_to_it(kind: type[Message]) -> None:
    assert list(supports(kind)) == list(kind.model_fields)


@pytest.mark.parametrize(
    ("payload", "path"),
    [
        ({"tools": [{"googleSearch": {}}]}, "tools[0].googleSearch"),
        ({"tools": [{}, {"functionDeclarations": [{"name": "f"}]}]}, "tools[1].functionDeclarations"),
        ({"toolConfig": {"functionCallingConfig": {"mode": "any"}}}, "toolConfig.functionCallingConfig.mode"),
        ({"cachedContent": "cachedContents/x"}, "cachedContent"),
        ({"continuationToken": "AAAA"}, "continuationToken"),
        ({"contents": [{"parts": [{"inlineData": {}}]}]}, "contents[0].parts[0].inlineData"),
        ({"contents": [{"parts": [{"fileData": {"file_uri": "x"}}]}]}, "contents[0].parts[0].fileData"),
        ({"contents": [{"parts": [{"functionResponse": {}}]}]}, "contents[0].parts[0].functionResponse"),
        ({"systemInstruction": {"parts": [{"executableCode": {}}]}}, "systemInstruction.parts[0].executableCode"),
        ({"generationConfig": {"responseMimeType": "application/json"}}, "generationConfig.responseMimeType"),
        ({"generationConfig": {"responseSchema": {"type": "STRING"}}}, "generationConfig.responseSchema"),
        ({"generationConfig": {"responseModalities": ["TEXT", "AUDIO"]}}, "generationConfig.responseModalities"),
        ({"generationConfig": {"speechConfig": {"languageCode": "x"}}}, "generationConfig.speechConfig"),
        ({"generationConfig": {"mediaResolution": 2}}, "generationConfig.mediaResolution"),
    ],
)
def test_what_is_not_served_is_refused_by_name(payload: dict[str, Any], path: str) -> None:
    with pytest.raises(Unimplemented) as caught:
        review(parse(GenerateContentRequest, payload))
    assert caught.value.message.startswith(f"{path}: ")
    assert caught.value.code == 501


@pytest.mark.parametrize("thinking", [{"thinkingBudget": 128}, {"thinkingLevel": "low"}])
def test_thinking_is_refused_by_a_model_that_cannot(thinking: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="cannot think"):
        review(parse(GenerateContentRequest, {"generationConfig": {"thinkingConfig": thinking}}))


@pytest.mark.parametrize(
    "payload",
    [
        {"tools": [], "toolConfig": {}, "safetySettings": [], "labels": {}, "cachedContent": "", "store": False},
        {"tools": [{}], "toolConfig": {"functionCallingConfig": {"mode": "MODE_UNSPECIFIED"}}, "serviceTier": 0},
        {"generationConfig": {"speechConfig": {}, "responseSchema": {}, "mediaResolution": 0, "responseMimeType": ""}},
        {"generationConfig": {"responseMimeType": "text/plain", "responseModalities": ["text", 0]}},
        {"generationConfig": {"thinkingConfig": {"includeThoughts": True, "thinkingBudget": 0}}},
        {"generationConfig": {"thinkingConfig": {"thinkingBudget": -1}}},
        {"contents": [{"role": "model", "parts": [{"text": "x", "thought": True, "thoughtSignature": "AAAA"}]}]},
    ],
)
def test_defaults_and_what_is_served_pass(payload: dict[str, Any]) -> None:
    assert review(parse(GenerateContentRequest, payload)) == []


def test_all_that_is_refused_is_named_at_once() -> None:
    payload = {"cachedContent": "x", "generationConfig": {"responseSchema": {"a": 1}, "imageConfig": {"a": 1}}}
    with pytest.raises(Unimplemented) as caught:
        review(parse(GenerateContentRequest, payload))
    fields = [violation["field"] for violation in caught.value.details[0]["fieldViolations"]]
    assert fields == ["generation_config.response_schema", "generation_config.image_config", "cached_content"]


def test_every_field_of_the_schema_is_known() -> None:
    known = {
        "GenerateContentRequest": GenerateContentRequest,
        "GenerationConfig": generation.GenerationConfig,
        "ThinkingConfig": generation.ThinkingConfig,
        "Part": content.Part,
        "Content": content.Content,
        "Tool": tools.Tool,
        "ToolConfig": tools.ToolConfig,
        "FunctionDeclaration": tools.FunctionDeclaration,
        "FunctionCallingConfig": tools.FunctionCallingConfig,
        "CountTokensRequest": CountTokensRequest,
        "SafetySetting": requests.SafetySetting,
        "Blob": content.Blob,
        "FileData": content.FileData,
        "FunctionCall": content.FunctionCall,
        "FunctionResponse": content.FunctionResponse,
    }
    fields = json.loads((Path(__file__).parents[2] / "data" / "wire_fields.json").read_text("utf-8"))
    for name, kind in known.items():
        assert set(fields[name]) <= {camel(field) for field in kind.model_fields}, name

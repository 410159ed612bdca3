"""The walker: refuses what is set and not served, names what has no effect, lets defaults pass."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from server.errors import InvalidArgument, Unimplemented
from server.wire import content, generation, requests, tools
from server.wire.message import Message, parse
from server.wire.requests import CountTokensRequest, GenerateContentRequest, lenient_paths
from server.wire.support import MAX_IGNORED, MAX_NAMED, THINKING, Capabilities, review, supports

SERVER_TOOLS = (
    *("googleSearch", "googleSearchRetrieval", "codeExecution", "urlContext", "fileSearch", "googleMaps"),
    "computerUse",
)
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
        *(({"tools": [{}, {name: {}}]}, f"tools[1].{name}") for name in SERVER_TOOLS),
        ({"tools": [{"mcp_servers": [{"name": "x"}]}]}, "tools[0].mcpServers"),
        ({"toolConfig": {"retrievalConfig": {"languageCode": "de"}}}, "toolConfig.retrievalConfig"),
        ({"cachedContent": "cachedContents/x"}, "cachedContent"),
        ({"continuationToken": "AAAA"}, "continuationToken"),
        ({"systemInstruction": {"parts": [{"executableCode": {}}]}}, "systemInstruction.parts[0].executableCode"),
        ({"generationConfig": {"responseModalities": ["TEXT", "AUDIO"]}}, "generationConfig.responseModalities"),
        ({"generationConfig": {"speechConfig": {"languageCode": "x"}}}, "generationConfig.speechConfig"),
        ({"generationConfig": {"mediaResolution": 2}}, "generationConfig.mediaResolution"),
        ({"generationConfig": {"audioTranscriptionConfig": {"mode": 1}}}, "generationConfig.audioTranscriptionConfig"),
        ({"generationConfig": {"imageConfig": {"aspectRatio": "1:1"}}}, "generationConfig.imageConfig"),
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
    message = parse(GenerateContentRequest, payload)
    assert review(message) == (message, [])


@pytest.mark.parametrize("thinking", [{"thinkingBudget": 128}, {"thinkingLevel": "low"}])
def test_thinking_passes_for_a_model_that_can(thinking: dict[str, Any]) -> None:
    message = parse(GenerateContentRequest, {"generationConfig": {"thinkingConfig": thinking}})
    assert review(message, Capabilities(abilities=frozenset({THINKING}))) == (message, [])


def leniently(payload: dict[str, Any], *paths: str, kind: type[Message] = GenerateContentRequest) -> Any:
    assert set(paths) <= set(lenient_paths())
    return review(parse(kind, payload), Capabilities(lenient=frozenset(paths)))


@pytest.mark.parametrize(
    ("payload", "path", "named"),
    [
        ({"tools": [{}, {"googleSearch": {}}]}, "tools.googleSearch", "tools[1].googleSearch"),
        ({"cachedContent": "x"}, "cachedContent", "cachedContent"),
        (
            {"generationConfig": {"imageConfig": {"a": 1}}},
            "generationConfig.imageConfig",
            "generationConfig.imageConfig",
        ),
        ({"generationConfig": {"topK": 3}}, "generationConfig.topK", "generationConfig.topK"),
        ({"generationConfig": {"responseModalities": [3]}}, "generationConfig.responseModalities", None),
        ({"generationConfig": {"thinkingConfig": {"thinkingLevel": 2}}}, "generationConfig.thinkingConfig", None),
    ],
)
def test_what_is_let_pass_is_taken_out_and_named(payload: dict[str, Any], path: str, named: str | None) -> None:
    message, ignored = leniently(payload, path)
    assert ignored == [named or path]
    assert review(message) == (message, [])


def test_only_the_listed_fields_are_let_pass() -> None:
    config = {"temperature": 0.5, "thinkingConfig": {"thinkingBudget": 9, "includeThoughts": True}}
    path = "generationConfig.thinkingConfig.thinkingBudget"
    message, ignored = leniently({"contents": "hi", "generationConfig": config}, path)
    assert ignored == [path]
    kept = {"contents": "hi", "generationConfig": {"temperature": 0.5, "thinkingConfig": {"includeThoughts": True}}}
    assert message == parse(GenerateContentRequest, kept)
    with pytest.raises(InvalidArgument, match="thinkingLevel"):
        leniently({"generationConfig": {"thinkingConfig": {"thinkingBudget": 9, "thinkingLevel": "LOW"}}}, path)


def test_a_value_that_has_its_effect_is_not_let_pass() -> None:
    payload = {"generationConfig": {"thinkingConfig": {"thinkingBudget": 0}, "responseModalities": ["TEXT"]}}
    message = parse(GenerateContentRequest, payload)
    paths = ("generationConfig.thinkingConfig.thinkingBudget", "generationConfig.responseModalities")
    assert leniently(payload, *paths) == (message, [])


def test_what_is_absent_is_not_named() -> None:
    payload = {"generationConfig": {"speechConfig": {}, "thinkingConfig": {}}, "tools": [{}]}
    paths = ("generationConfig.speechConfig", "generationConfig.thinkingConfig", "tools.googleSearch", "tools")
    assert leniently(payload, *paths)[1] == []


def test_leniency_holds_within_a_wrapped_request() -> None:
    wrapped = {"generateContentRequest": {"contents": "hi", "generationConfig": {"seed": 7}}}
    message, ignored = leniently(wrapped, "generationConfig.seed", kind=CountTokensRequest)
    assert ignored == ["generateContentRequest.generationConfig.seed"]
    assert message.as_generation().generation_config.seed is None


def test_a_field_that_is_let_pass_is_checked_all_the_same() -> None:
    with pytest.raises(InvalidArgument, match="thinking_budget"):
        leniently(
            {"generationConfig": {"thinkingConfig": {"thinkingBudget": "many"}}}, "generationConfig.thinkingConfig"
        )


def test_all_that_is_refused_is_named_at_once() -> None:
    payload = {"cachedContent": "x", "generationConfig": {"speechConfig": {"a": 1}, "imageConfig": {"a": 1}}}
    with pytest.raises(Unimplemented) as caught:
        review(parse(GenerateContentRequest, payload))
    fields = [violation["field"] for violation in caught.value.details[0]["fieldViolations"]]
    assert fields == ["generation_config.speech_config", "generation_config.image_config", "cached_content"]


@pytest.mark.parametrize(
    ("part", "failure"),
    [({"executableCode": {}, "mediaProcessing": 1}, Unimplemented), ({"thought": True, "toolCall": {}}, Unimplemented)],
)
def test_what_is_refused_many_times_is_counted(part: dict[str, Any], failure: type[Exception]) -> None:
    message = parse(GenerateContentRequest, {"contents": [{"parts": [part] * 1000}]})
    refused = 1000 * (len(part) - ("thought" in part))
    with pytest.raises(failure, match=rf"… and {refused - MAX_NAMED} more problems$") as caught:
        review(message)
    assert len(caught.value.args[0].splitlines()) == MAX_NAMED + 1


def test_a_400_wins_however_late_it_comes() -> None:
    parts = [{"executableCode": {}}] * 1000
    config = {"thinkingConfig": {"thinkingBudget": 9}}
    with pytest.raises(InvalidArgument) as caught:
        review(parse(GenerateContentRequest, {"contents": [{"parts": parts}], "generationConfig": config}))
    assert [violation.field for violation in caught.value.violations] == [
        "generation_config.thinking_config.thinking_budget"
    ]


def test_places_without_effect_are_named_up_to_a_number() -> None:
    parts = [{"text": "a", "partMetadata": {"a": 1}}] * 1000
    _, ignored = review(parse(GenerateContentRequest, {"contents": [{"parts": parts}]}))
    assert ignored == [f"contents[0].parts[{index}].partMetadata" for index in range(MAX_IGNORED)]
    message, _ = leniently({"tools": [{"googleSearch": {}}] * 1000}, "tools.googleSearch")
    assert review(message) == (message, []), "all of them are taken out"

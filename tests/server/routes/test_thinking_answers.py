"""Whole requests to models that think, over the templates of the families and a scripted engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fakes import INFO, Answering, Harness, events_of, serving
from support.templates import template_folder

from engine.api.events import CandidateFinished, Delta, Event, FinishReason, RequestFinished, TokenLogprobs
from engine.api.requests import Request

THOUGHTS, CALL = "Paris, then.", '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
WEATHER = {
    "name": "weather",
    "description": "The weather",
    "parameters": {"type": "OBJECT", "properties": {"city": {"type": "STRING"}}},
}
TOOLS = [{"functionDeclarations": [WEATHER]}]
ASKED = {"role": "user", "parts": [{"text": "What is the weather?"}]}

Starting = Callable[..., Any]


@pytest.fixture
def start(tmp_path: Path) -> Starting:
    """Starts a server of a model with one of the real templates."""

    @asynccontextmanager
    async def started(name: str, **settings: Any) -> AsyncIterator[Harness]:
        async with serving(template_folder(tmp_path / "tiny", name), **settings) as harness:
            harness.engine.info = replace(INFO, max_context=100_000)
            yield harness

    return started


def saying(thoughts: str, text: str, *, reason: FinishReason = FinishReason.STOP, message: str = "") -> Answering:
    """One candidate that writes ``thoughts``, markers included, and then ``text``: a token for each character."""

    def script(request: Request) -> list[Event]:
        scored = (TokenLogprobs(-0.5),) if request.sampling.logprobs is not None else ()
        deltas: list[Event] = [Delta(0, (65,), char, scored, thought=True) for char in thoughts]
        deltas += [Delta(0, (66,), char, scored) for char in text]
        tokens = len(thoughts) + len(text)
        finished = CandidateFinished(0, reason, tokens, len(thoughts), message)
        return [*deltas, finished, RequestFinished(len(request.prompt), 0, tokens, None, len(thoughts))]

    return script


def body(thinking: dict[str, Any] | None = None, *, tools: bool = False, **config: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {"contents": [ASKED], "generationConfig": config}
    if thinking is not None:
        whole["generationConfig"] = {**config, "thinkingConfig": thinking}
    return whole | ({"tools": TOOLS} if tools else {})


def parts_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    (candidate,) = answer["candidates"]
    assert candidate["content"]["role"] == "model"
    parts: list[dict[str, Any]] = candidate["content"]["parts"]
    assert parts
    return parts


async def whole(harness: Harness, request: dict[str, Any]) -> dict[str, Any]:
    response = await harness.generate(request)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def prompt_text(harness: Harness) -> str:
    tokenizer = harness.services.registry.entries()[0].tokenizer
    return "".join(map(tokenizer.token_text, harness.engine.requests[-1].prompt))


async def test_thoughts_are_shown_on_request_and_always_counted(start: Starting) -> None:
    thoughts = f"<think>\n{THOUGHTS}\n</think>"
    async with start("Qwen3-0.6B") as harness:
        for shown in (True, False):
            harness.engine.answers.append(saying(thoughts, "\n\nSunny.\n"))
            answer = await whole(harness, body({"includeThoughts": shown}))
            *before, text = parts_of(answer)
            assert text == {"text": "Sunny.\n"}
            assert [(part["text"], part["thought"]) for part in before] == ([(THOUGHTS, True)] if shown else [])
            assert all(part["thoughtSignature"] for part in before)
            usage = answer["usageMetadata"]
            assert usage["thoughtsTokenCount"] == len(thoughts)
            assert usage["candidatesTokenCount"] == answer["candidates"][0]["tokenCount"] == len("\n\nSunny.\n")
            total = usage["promptTokenCount"] + usage["thoughtsTokenCount"] + usage["candidatesTokenCount"]
            assert usage["totalTokenCount"] == total


@pytest.mark.parametrize("shown", [True, False])
async def test_a_stream_of_thoughts(start: Starting, shown: bool) -> None:
    async with start("Qwen3-0.6B") as harness:
        harness.engine.answers.append(saying(f"<think>\n{THOUGHTS}\n</think>", "\n\nSunny."))
        response = await harness.stream(body({"includeThoughts": shown}))
        chunks = events_of(response.text)
        parts = [part for chunk in chunks for part in parts_of(chunk)]
        assert "".join(part["text"] for part in parts if "thought" not in part) == "Sunny."
        thoughts = [part for part in parts if "thought" in part]
        assert "".join(part["text"] for part in thoughts) == (THOUGHTS if shown else "")
        assert [part.get("thoughtSignature", "") != "" for part in thoughts] == [False] * (len(thoughts) - 1) + (
            [True] if shown else []
        )
        assert [chunk["candidates"][0].get("finishReason") for chunk in chunks[-2:]] == [None, "STOP"]
        assert chunks[-1]["usageMetadata"]["thoughtsTokenCount"] == len(f"<think>\n{THOUGHTS}\n</think>")
        assert "thoughtsTokenCount" in chunks[0]["usageMetadata"]


async def test_the_engine_is_told_where_thoughts_stand(start: Starting) -> None:
    async with start("Qwen3.5") as harness:
        for thinking, budget, opened in (
            (None, None, True),
            ({"thinkingBudget": 0}, 0, False),
            ({"thinkingBudget": 20}, 20, True),
            ({"thinkingLevel": "LOW"}, 1024, True),
        ):
            await whole(harness, body(thinking))
            told = harness.engine.requests[-1].sampling.thinking
            assert told is not None
            assert (told.budget, told.open) == (budget, opened)
        assert (await harness.client.get("/v1/models/tiny")).json()["thinking"] is True


async def test_thoughts_that_the_prompt_opened(start: Starting) -> None:
    async with start("DeepSeek-R1") as harness:
        harness.engine.answers.append(saying(f"{THOUGHTS}\n</think>", "\n\nSunny."))
        thought, text = parts_of(await whole(harness, body({"includeThoughts": True})))
        assert (thought["text"], text["text"]) == (THOUGHTS, "Sunny.")


async def test_nothing_but_thoughts_has_a_part(start: Starting) -> None:
    async with start("SmolLM3") as harness:
        for shown in (True, False):
            harness.engine.answers.append(saying("<think>\nLet me ", "", reason=FinishReason.MAX_TOKENS))
            answer = await whole(harness, body({"includeThoughts": shown}))
            assert parts_of(answer)[0]["text"] == ("Let me" if shown else "")
            assert answer["candidates"][0]["finishReason"] == "MAX_TOKENS"
            assert answer["usageMetadata"]["candidatesTokenCount"] == 0


async def test_log_probabilities_are_those_of_the_answer(start: Starting) -> None:
    async with start("Qwen3-0.6B") as harness:
        harness.engine.answers.append(saying("<think>a</think>", "Sunny."))
        (candidate,) = (await whole(harness, body(responseLogprobs=True)))["candidates"]
        assert len(candidate["logprobsResult"]["chosenCandidates"]) == candidate["tokenCount"] == 6
        assert candidate["avgLogprobs"] == -0.5


async def test_a_model_that_does_not_think_accepts_what_changes_nothing(start: Starting) -> None:
    async with start("Qwen2.5") as harness:
        for thinking in ({"includeThoughts": True}, {"thinkingBudget": 0}, {"thinkingBudget": -1}):
            assert parts_of(await whole(harness, body(thinking))) == [{"text": "ok"}]
        for thinking in ({"thinkingBudget": 1}, {"thinkingLevel": "LOW"}):
            assert (await harness.generate(body(thinking))).status_code == 400
        assert (await harness.client.get("/v1/models/tiny")).json()["thinking"] is False


async def test_a_grammar_that_broke_is_named(start: Starting) -> None:
    async with start("Qwen3-0.6B") as harness:
        harness.engine.answers.append(
            saying("", '{"a": ', reason=FinishReason.MALFORMED, message="the limit of 2000 items was met")
        )
        answer = await whole(harness, body(responseMimeType="application/json"))
        assert parts_of(answer) == [{"text": '{"a": '}]
        assert answer["candidates"][0]["finishReason"] == "MALFORMED_RESPONSE"
        assert answer["candidates"][0]["finishMessage"] == "the limit of 2000 items was met"


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_tool_loop_keeps_its_reasoning(start: Starting, shown: bool, streamed: bool) -> None:
    """As clients do it: thoughts are dropped, calls are sent back as they came."""
    async with start("Qwen3-0.6B") as harness:
        harness.engine.answers.append(saying(f"<think>\n{THOUGHTS}\n</think>", f"\n\nI look.\n{CALL}\n"))
        request = body({"includeThoughts": shown}, tools=True)
        chunks = events_of((await harness.stream(request)).text) if streamed else [await whole(harness, request)]
        assert chunks[-1]["candidates"][0]["finishReason"] == "STOP"
        kept = [part for chunk in chunks for part in parts_of(chunk) if not part.get("thought")]
        (call,) = [part for part in kept if "functionCall" in part]
        assert call["functionCall"]["args"] == {"city": "Paris"}
        assert "".join(part.get("text", "") for part in kept) == "I look."

        result = {"functionResponse": {"name": "weather", "response": {"sky": "clear"}}}
        request["contents"] = [ASKED, {"role": "model", "parts": kept}, {"role": "user", "parts": [result]}]
        await whole(harness, request)
        assert f"<think>\n{THOUGHTS}\n</think>\n\nI look." in prompt_text(harness)

        call["thoughtSignature"] = "skip_thought_signature_validator"
        await whole(harness, request)
        assert THOUGHTS not in prompt_text(harness)


async def test_signatures_of_another_caller_say_nothing(start: Starting) -> None:
    async with start("Qwen3-0.6B", api_keys=("one", "two")) as harness:
        harness.engine.answers.append(saying(f"<think>\n{THOUGHTS}\n</think>", CALL))
        response = await harness.generate(body(tools=True), headers={"x-goog-api-key": "one"})
        result = {"functionResponse": {"name": "weather", "response": {"sky": "clear"}}}
        turns = [ASKED, response.json()["candidates"][0]["content"], {"role": "user", "parts": [result]}]
        for key, known in (("one", True), ("two", False)):
            again = {**body(tools=True), "contents": turns}
            assert (await harness.generate(again, headers={"x-goog-api-key": key})).status_code == 200
            assert (THOUGHTS in prompt_text(harness)) == known


async def test_harmony_keeps_its_analysis(start: Starting) -> None:
    async with start("gpt-oss") as harness:
        call = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city":"Paris"}'
        thoughts = f"<|channel|>analysis<|message|>{THOUGHTS}<|end|><|start|>assistant"
        harness.engine.answers.append(saying(thoughts, call))
        content = (await whole(harness, body(tools=True)))["candidates"][0]["content"]
        (part,) = content["parts"]
        assert part["functionCall"]["name"] == "weather"
        result = {"functionResponse": {"name": "weather", "response": {"sky": "clear"}}}
        await whole(harness, {**body(tools=True), "contents": [ASKED, content, {"role": "user", "parts": [result]}]})
        assert f"analysis<|message|>{THOUGHTS}<|end|>" in prompt_text(harness)


async def test_calls_in_a_stream_come_whole_and_broken_ones_end_it(start: Starting) -> None:
    async with start("Qwen3-Coder") as harness:
        good = "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
        bad = "<tool_call>\n<function=rm>\n</function>\n</tool_call>"
        harness.engine.answers.append(saying("", f"{good}\n{good}\n{bad}\nDone."))
        chunks = events_of((await harness.stream(body(tools=True))).text)
        calls = [part["functionCall"] for part in parts_of(chunks[-1])]
        assert [(call["name"], call["args"]) for call in calls] == [("weather", {"city": "Paris"})] * 2
        assert calls[0]["id"] != calls[1]["id"]
        last = chunks[-1]["candidates"][0]
        assert last["finishReason"] == "MALFORMED_FUNCTION_CALL"
        assert "'rm'" in last["finishMessage"]

"""Events to responses, without HTTP: what a chunk holds and when there is none."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from engine.api.events import (
    CandidateFinished,
    Delta,
    ErrorKind,
    Event,
    FinishReason,
    RequestError,
    RequestFinished,
    TokenLogprobs,
    TopLogprob,
)
from server.errors import DeadlineExceeded
from server.families.table import FAMILIES
from server.mapper.candidates import Reading
from server.mapper.parts import answer_parser
from server.mapper.stream import Answer
from server.mapper.thought_signature import Signer

STOP = FinishReason.STOP


def answer(candidates: int = 1) -> Answer:
    return Answer("id", "m", 7, candidates, lambda token: f"<{token}>")


async def told(*events: Event) -> AsyncGenerator[Event, None]:
    for event in events:
        yield event


async def chunks(*events: Event, candidates: int = 1) -> list[dict[str, Any]]:
    return [chunk async for chunk in answer(candidates).chunks(told(*events))]


async def test_logprobs_wait_for_their_text() -> None:
    scored = [TokenLogprobs(-1.0, (TopLogprob(4, -0.25),)), TokenLogprobs(-2.0, (TopLogprob(5, 0.0),))]
    found = await chunks(
        Delta(0, (3,), "", (scored[0],)),
        Delta(0, (5,), "é", (scored[1],)),
        CandidateFinished(0, STOP, 2),
        RequestFinished(7, 0, 2),
    )
    assert found[0]["candidates"][0]["logprobsResult"] == {
        "chosenCandidates": [
            {"token": "<3>", "tokenId": 3, "logProbability": -1.0},
            {"token": "<5>", "tokenId": 5, "logProbability": -2.0},
        ],
        "topCandidates": [
            {"candidates": [{"token": "<4>", "tokenId": 4, "logProbability": -0.25}]},
            {"candidates": [{"token": "<5>", "tokenId": 5, "logProbability": 0.0}]},
        ],
        "logProbabilitySum": -3.0,
    }
    assert found[1]["candidates"] == [
        {
            "content": {"parts": [{"text": ""}], "role": "model"},
            "index": 0,
            "finishReason": "STOP",
            "tokenCount": 2,
            "avgLogprobs": -1.5,
        }
    ]


async def test_an_empty_answer_is_one_chunk() -> None:
    [chunk] = await chunks(CandidateFinished(0, STOP, 0), RequestFinished(7, 7, 0))
    assert chunk["candidates"][0]["content"] == {"parts": [{"text": ""}], "role": "model"}
    assert chunk["candidates"][0]["tokenCount"] == 0
    assert chunk["usageMetadata"]["totalTokenCount"] == chunk["usageMetadata"]["cachedContentTokenCount"] == 7


async def test_the_last_candidate_ends_with_the_request() -> None:
    found = await chunks(
        Delta(1, (3,), "a"),
        CandidateFinished(1, FinishReason.MAX_TOKENS, 1),
        Delta(0, (3,), "b"),
        CandidateFinished(0, STOP, 1),
        RequestFinished(7, 4, 2),
        candidates=2,
    )
    shape = [(c["candidates"][0]["index"], c["candidates"][0].get("finishReason")) for c in found]
    assert shape == [(1, None), (1, "MAX_TOKENS"), (0, None), (0, "STOP")]
    assert [c["usageMetadata"]["candidatesTokenCount"] for c in found] == [1, 1, 2, 2]
    assert ["cachedContentTokenCount" in c["usageMetadata"] for c in found] == [False, False, False, True]


@pytest.mark.parametrize("before", [(), (Delta(0, (3,), "a"),)])
async def test_a_failure_is_raised_and_aborted_candidates_are_not_told(before: tuple[Event, ...]) -> None:
    events = [
        *before,
        CandidateFinished(0, FinishReason.ABORTED, 0),
        RequestFinished(7, 0, 0, RequestError(ErrorKind.DEADLINE, "late")),
    ]
    stream = answer().chunks(told(*events))
    for _ in before:
        assert "finishReason" not in (await anext(stream))["candidates"][0]
    with pytest.raises(DeadlineExceeded, match="late"):
        await anext(stream)
    with pytest.raises(DeadlineExceeded, match="late"):
        await answer().whole(told(*events))


async def test_the_whole_answer_has_every_candidate_in_order() -> None:
    events = [
        Delta(1, (3, 4), "xy"),
        Delta(0, (3,), "a"),
        CandidateFinished(1, STOP, 2),
        Delta(0, (3,), "b"),
        CandidateFinished(0, STOP, 2),
        RequestFinished(7, 0, 4),
    ]
    whole = await answer(2).whole(told(*events))
    texts = [candidate["content"]["parts"][0]["text"] for candidate in whole["candidates"]]
    assert texts == ["ab", "xy"]
    assert whole["usageMetadata"]["totalTokenCount"] == 11


def reader(*, shown: bool = False, tools: bool = True) -> Reading:
    """As for Qwen3 with one declared function."""
    family = next(family for family in FAMILIES if family.name == "hermes")
    declared = [{"type": "function", "function": {"name": "now", "parameters": {}}}] if tools else []
    return Reading(answer_parser(family, declared), shown, Signer(b"k" * 32, ""))


async def read(reading: Reading, *events: Event, candidates: int = 1) -> list[dict[str, Any]]:
    made = Answer("id", "m", 7, candidates, lambda token: f"<{token}>", reading)
    return [chunk async for chunk in made.chunks(told(*events))]


CALL = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'


async def test_dropped_thoughts_make_no_chunk_but_count() -> None:
    found = await read(
        reader(),
        Delta(0, (3, 4), "<think>hm", thought=True),
        Delta(0, (5,), "</think>", thought=True),
        Delta(0, (6,), "Yes."),
        CandidateFinished(0, STOP, 4, 3),
        RequestFinished(7, 0, 4, None, 3),
    )
    assert [chunk["candidates"][0]["content"]["parts"] for chunk in found] == [[{"text": "Yes."}], [{"text": ""}]]
    for chunk in found:
        usage = chunk["usageMetadata"]
        assert (usage["thoughtsTokenCount"], usage["candidatesTokenCount"], usage["totalTokenCount"]) == (3, 1, 11)


async def test_every_run_of_thoughts_has_a_signature_of_its_own() -> None:
    text = f"<think>one</think>{CALL}<think>two</think>{CALL}{CALL}"
    events = (Delta(0, (3,), text), CandidateFinished(0, STOP, 1), RequestFinished(7, 0, 1))
    [chunk] = await read(reader(shown=True), *events[1:])
    assert chunk["candidates"][0]["content"]["parts"] == [{"text": ""}]
    for chunks in (await read(reader(shown=True), *events), await read(reader(shown=True), *events_by_char(text))):
        parts = [part for chunk in chunks for part in chunk["candidates"][0]["content"]["parts"]]
        signer = Signer(b"k" * 32, "")
        opened = [signer.open_signature(b64decode(part.get("thoughtSignature", ""))) for part in parts]
        calls = [thoughts for part, thoughts in zip(parts, opened, strict=True) if "functionCall" in part]
        assert calls == ["one", "two", "two"]
        ends = [thoughts for part, thoughts in zip(parts, opened, strict=True) if "thought" in part and thoughts]
        assert ends == ["one", "two"]


def events_by_char(text: str) -> list[Event]:
    deltas: list[Event] = [Delta(0, (3,), char) for char in text]
    return [*deltas, CandidateFinished(0, STOP, len(text)), RequestFinished(7, 0, len(text))]


async def test_candidates_are_read_apart() -> None:
    found = await read(
        reader(),
        Delta(0, (3,), "<tool_call>"),
        Delta(1, (3,), "Hello"),
        Delta(0, (3,), "{}</tool_call>"),
        CandidateFinished(1, STOP, 1),
        CandidateFinished(0, FinishReason.MAX_TOKENS, 2),
        RequestFinished(7, 0, 3),
        candidates=2,
    )
    ends = {
        chunk["candidates"][0]["index"]: chunk["candidates"][0]
        for chunk in found
        if "finishReason" in chunk["candidates"][0]
    }
    assert (ends[0]["finishReason"], ends[1]["finishReason"]) == ("MALFORMED_FUNCTION_CALL", "STOP")
    assert ends[0]["finishMessage"] == "The model wrote a function call that cannot be read."
    assert "finishMessage" not in ends[1]


async def test_without_a_signer_nothing_is_signed() -> None:
    reading = replace(reader(shown=True), signer=None)
    [chunk] = await read(reading, Delta(0, (3,), "<think>a</think>"), CandidateFinished(0, STOP, 1))
    assert chunk["candidates"][0]["content"]["parts"] == [{"text": "a", "thought": True}]

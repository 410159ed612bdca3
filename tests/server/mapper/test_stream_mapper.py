"""Events to responses, without HTTP: what a chunk holds and when there is none."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest

from engine.types import (
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
from server.mapper.stream import Answer

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

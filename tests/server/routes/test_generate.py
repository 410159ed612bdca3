"""generateContent over HTTP: the whole answer, its numbers, and every way in which it can fail."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from support.fakes import INFO, Harness, Pause, RawCall, ScriptedEngine, failing, saying, serving, tokenizer_folder
from support.tiny import EOS_ID
from support.waiting import PATIENCE

from engine.api.errors import EngineUnavailable, Overloaded
from engine.api.events import ErrorKind, FinishReason
from server.config.models_file import ModelSpec

HI = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}
PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
PROMPT_TOKENS = 3 + len("user\nhi\nassistant\n")


def with_config(**config: Any) -> dict[str, Any]:
    return {**HI, "generationConfig": config}


async def test_the_whole_answer(harness: Harness) -> None:
    harness.engine.answers.append(saying("Paris", cached=4))
    response = await harness.generate(HI)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.pop("responseId") == harness.engine.requests[0].id
    assert body.pop("createTime").endswith("Z")
    assert body == {
        "candidates": [
            {
                "content": {"parts": [{"text": "Paris"}], "role": "model"},
                "index": 0,
                "finishReason": "STOP",
                "tokenCount": 5,
            }
        ],
        "usageMetadata": {
            "promptTokenCount": PROMPT_TOKENS,
            "candidatesTokenCount": 5,
            "totalTokenCount": PROMPT_TOKENS + 5,
            "promptTokensDetails": [{"modality": "TEXT", "tokenCount": PROMPT_TOKENS}],
            "candidatesTokensDetails": [{"modality": "TEXT", "tokenCount": 5}],
            "cachedContentTokenCount": 4,
            "cacheTokensDetails": [{"modality": "TEXT", "tokenCount": 4}],
        },
        "modelVersion": "tiny",
    }


async def test_logprobs_are_aligned_with_the_tokens(harness: Harness) -> None:
    harness.engine.answers.append(saying("abc", reason=FinishReason.MAX_TOKENS))
    response = await harness.generate(with_config(responseLogprobs=True, logprobs=2))
    candidate = response.json()["candidates"][0]
    result = candidate["logprobsResult"]
    assert [entry["token"] for entry in result["chosenCandidates"]] == ["a", "b", "c"]
    assert [len(step["candidates"]) for step in result["topCandidates"]] == [2, 2, 2]
    assert result["topCandidates"][0]["candidates"][0] == {
        "token": "a",
        "tokenId": result["chosenCandidates"][0]["tokenId"],
        "logProbability": -0.5,
    }
    assert (candidate["avgLogprobs"], result["logProbabilitySum"]) == (-0.5, -1.5)
    assert (candidate["finishReason"], candidate["tokenCount"]) == ("MAX_TOKENS", 3)


async def test_response_logprobs_alone_give_the_chosen_tokens(harness: Harness) -> None:
    response = await harness.generate(with_config(responseLogprobs=True))
    result = response.json()["candidates"][0]["logprobsResult"]
    assert len(result["chosenCandidates"]) == 2
    assert "topCandidates" not in result


async def test_several_candidates(harness: Harness) -> None:
    response = await harness.generate(with_config(candidateCount=3))
    body = response.json()
    assert [candidate["index"] for candidate in body["candidates"]] == [0, 1, 2]
    assert body["usageMetadata"]["candidatesTokenCount"] == 6
    assert body["usageMetadata"]["promptTokenCount"] == PROMPT_TOKENS


async def test_every_setting_reaches_the_engine(harness: Harness) -> None:
    await harness.generate(
        with_config(
            temperature=0,
            top_p=0.5,
            topK=40.0,
            candidateCount="2",
            maxOutputTokens=7,
            stopSequences=["END"],
            presencePenalty=0.5,
            frequency_penalty=-0.5,
            seed=-3,
            responseLogprobs=True,
            logprobs=4,
        )
    )
    request = harness.engine.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.0, 0.5, 40, -3)
    assert (sampling.max_tokens, sampling.stop, sampling.stop_ids) == (7, ("END",), (EOS_ID,))
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.logprobs) == (0.5, -0.5, 4)
    assert (request.candidates, len(request.prompt)) == (2, PROMPT_TOKENS)


async def test_seeds_are_drawn_and_limits_are_the_models(harness: Harness) -> None:
    for _ in range(2):
        await harness.generate(HI)
    first, second = (request.sampling for request in harness.engine.requests)
    assert first.seed != second.seed
    assert first.max_tokens == 100
    assert (first.temperature, first.top_p, first.top_k, first.logprobs) == (1.0, 1.0, 0, None)


async def test_a_limit_over_the_models_is_capped_and_named(harness: Harness) -> None:
    response = await harness.generate(with_config(maxOutputTokens=65536))
    assert harness.engine.requests[0].sampling.max_tokens == 100
    assert response.headers["x-castor-ignored"] == "generationConfig.maxOutputTokens"


async def test_fields_without_effect_are_named(harness: Harness) -> None:
    body = {
        **HI,
        "safetySettings": [{"category": 7, "threshold": "block_none"}],
        "labels": {"aLabel": "x"},
        "serviceTier": "flex",
        "store": True,
    }
    response = await harness.generate(body)
    assert response.status_code == 200
    assert response.headers["x-castor-ignored"] == "safetySettings, labels, serviceTier, store"
    assert "x-castor-ignored" not in (await harness.generate({**HI, "tools": [], "safetySettings": []})).headers


@pytest.mark.parametrize(
    ("outcome", "code", "status"),
    [
        (failing(ErrorKind.REFUSED, "no"), 400, "INVALID_ARGUMENT"),
        (failing(ErrorKind.OVERLOADED, "no"), 429, "RESOURCE_EXHAUSTED"),
        (failing(ErrorKind.CANCELLED, "no"), 499, "CANCELLED"),
        (failing(ErrorKind.INTERNAL, "no"), 500, "INTERNAL"),
        (failing(ErrorKind.UNAVAILABLE, "no"), 503, "UNAVAILABLE"),
        (failing(ErrorKind.DEADLINE, "no"), 504, "DEADLINE_EXCEEDED"),
        (lambda request: [ValueError("secret")], 500, "INTERNAL"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_failures_of_the_engine(harness: Harness, outcome: Any, code: int, status: str, streamed: bool) -> None:
    harness.engine.answers.append(outcome)
    response = await (harness.stream(HI) if streamed else harness.generate(HI))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["status"]) == (code, code, status)
    assert "secret" not in response.text


async def test_a_full_queue_says_when_to_come_back(harness: Harness) -> None:
    harness.engine.refusal = Overloaded("")
    response = await harness.generate(HI)
    assert response.status_code == 429
    assert response.json()["error"]["details"] == [
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "2s"}
    ]
    assert response.headers["retry-after"] == "2"


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_full_queue_is_known_before_the_request_is_read(harness: Harness, streamed: bool) -> None:
    harness.engine.full = True
    for body in (HI, {**HI, "foo": 1}):
        response = await (harness.stream(body) if streamed else harness.generate(body))
        error = response.json()["error"]
        assert (response.status_code, error["status"]) == (429, "RESOURCE_EXHAUSTED")
        assert error["message"] == "The queue of tiny is full: try again later."
        assert (response.headers["connection"], response.headers["retry-after"]) == ("close", "2")
    assert not harness.engine.requests
    path = "/v1beta/models/tiny:countTokens"
    assert (await harness.client.post(path, json=HI)).status_code == 200
    harness.engine.full = False
    assert (await harness.generate(HI)).status_code == 200


async def test_what_is_prepared_counts_as_queued(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedEngine, "room", lambda engine: 3 - len(engine.open))
    harness.engine.answers.extend([lambda request: [Pause()]] * 3)
    calls = [asyncio.create_task(harness.generate(HI)) for _ in range(20)]
    done, waiting = set[Any](), set[Any](calls)
    while len(done) < 17:
        done, waiting = await asyncio.wait(calls, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
    # They came in one turn of the event loop, and yet each knew of those before it, and was not read.
    assert {(call.result().status_code, call.result().headers.get("connection")) for call in done} == {(429, "close")}
    assert len(waiting) == 3
    async with asyncio.timeout(PATIENCE):
        while len(harness.engine.requests) < 3:
            await asyncio.sleep(0.01)
    for call in waiting:
        call.cancel()


async def test_an_engine_that_is_not_there(harness: Harness) -> None:
    harness.engine.refusal = EngineUnavailable("The model tiny is loading (40%).")
    response = await harness.generate(HI)
    assert response.status_code == 503
    assert "40%" in response.json()["error"]["message"]


async def test_a_bad_request_is_told_even_while_the_model_loads(harness: Harness) -> None:
    harness.engine.info = None
    assert (await harness.generate({**HI, "foo": 1})).status_code == 400
    assert (await harness.generate(HI)).status_code == 503


async def test_a_prompt_over_the_context_names_both_numbers(harness: Harness) -> None:
    room = INFO.max_context - PROMPT_TOKENS + len("hi")
    fits = {"contents": "x" * (room - 1)}
    assert (await harness.generate(fits)).status_code == 200
    assert harness.engine.requests[0].sampling.max_tokens == 1
    response = await harness.generate({"contents": "x" * room})
    assert response.status_code == 400
    assert "(512)" in response.json()["error"]["message"]
    assert "(511)" in response.json()["error"]["message"]


async def test_texts_that_cannot_fit_are_not_tokenized(harness: Harness) -> None:
    response = await harness.generate({"contents": "x" * 1_000_000})
    assert response.status_code == 400
    assert "1000000 characters" in response.json()["error"]["message"]


async def test_a_body_over_the_limit(tmp_path: Path) -> None:
    async with serving(tokenizer_folder(tmp_path / "tiny"), max_body_bytes=2000) as harness:
        response = await harness.generate({"contents": "x" * 3000})
        assert response.status_code == 413
        assert "2000 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize("text", ["soon", "-1", "0", "nan", "1e9", ""])
async def test_malformed_timeouts(harness: Harness, text: str) -> None:
    response = await harness.generate(HI, headers={"x-server-timeout": text})
    assert response.status_code == 400
    assert "X-Server-Timeout" in response.json()["error"]["message"]


async def test_the_deadline_is_the_clients_or_the_entrys(harness: Harness) -> None:
    before = time.monotonic()
    await harness.generate(HI, headers={"x-server-timeout": "45"})
    await harness.generate(HI)
    after = time.monotonic()
    short, long = (request.deadline for request in harness.engine.requests)
    assert short is not None
    assert long is not None
    assert before + 45 <= short <= after + 45
    assert before + 600 <= long <= after + 600


async def test_a_deadline_that_passes_before_the_engine_has_the_request(harness: Harness) -> None:
    response = await harness.generate(HI, headers={"x-server-timeout": "0.000001"})
    assert response.status_code == 504
    assert response.json()["error"]["status"] == "DEADLINE_EXCEEDED"
    assert harness.engine.requests == []


async def test_a_body_of_very_many_parts(harness: Harness) -> None:
    parts = [{"text": ""}] * 20_000
    assert (await harness.generate({"contents": {"parts": parts}})).status_code == 200
    response = await harness.generate({"contents": {"parts": parts * 6}})
    assert response.status_code == 400
    assert "at most 100000" in response.json()["error"]["message"]


async def test_a_model_in_the_body_must_be_the_one_of_the_path(harness: Harness) -> None:
    assert (await harness.generate({**HI, "model": "models/gemini-x"})).status_code == 200
    response = await harness.generate({**HI, "model": "models/other"})
    assert response.status_code == 404


async def test_another_model_in_the_body(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "tiny")
    async with serving(folder, [ModelSpec("tiny", str(folder)), ModelSpec("other", str(folder))]) as harness:
        response = await harness.generate({**HI, "model": "models/other"})
        assert response.status_code == 400
        assert "'tiny'" in response.json()["error"]["message"]


@pytest.mark.parametrize("method", ["generateContent", "streamGenerateContent?alt=sse"])
async def test_a_client_that_hangs_up_ends_the_work(harness: Harness, method: str) -> None:
    harness.engine.answers.append(lambda request: [Pause()])
    call = RawCall(harness.app, f"/v1/models/tiny:{method}", HI)
    async with asyncio.timeout(PATIENCE):
        while not harness.engine.requests:
            await asyncio.sleep(0.01)
    call.hang_up()
    await call.ended()
    assert harness.engine.cancelled == [harness.engine.requests[0].id]
    assert not harness.engine.open
    assert call.sent.empty()


async def test_what_ended_by_itself_is_not_cancelled(harness: Harness) -> None:
    await harness.generate(HI)
    await harness.stream(HI)
    assert harness.engine.cancelled == []
    assert not harness.engine.open

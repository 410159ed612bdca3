"""streamGenerateContent: both framings to the byte, keep-alives, and errors before and after the first byte."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.fakes import Harness, Pause, RawCall, events_of, failing, saying, serving, tokenizer_folder

from engine.api.events import CandidateFinished, Delta, ErrorKind, FinishReason, RequestFinished

HI = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}
SSE = "/v1beta/models/tiny:streamGenerateContent?alt=sse"


def check_chunks(chunks: list[dict[str, Any]]) -> None:
    """What every client needs of every chunk."""
    heads = [{name: chunk[name] for name in ("modelVersion", "responseId", "createTime")} for chunk in chunks]
    assert all(head == heads[0] for head in heads)
    for chunk in chunks:
        for candidate in chunk["candidates"]:
            assert candidate["content"]["role"] == "model"
            assert all(isinstance(part["text"], str) for part in candidate["content"]["parts"])
            assert candidate["content"]["parts"]
    totals = [chunk["usageMetadata"]["totalTokenCount"] for chunk in chunks]
    assert totals == sorted(totals)
    reasons = [candidate.get("finishReason") for chunk in chunks for candidate in chunk["candidates"]]
    assert [reason for reason in reasons if reason] == ["STOP"]
    assert reasons[-1] == "STOP"


async def test_server_sent_events(harness: Harness) -> None:
    harness.engine.answers.append(saying("Hello", cached=3))
    response = await harness.stream(HI)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events_of(response.text)
    check_chunks(chunks)
    assert "".join(chunk["candidates"][0]["content"]["parts"][0]["text"] for chunk in chunks) == "Hello"
    usage = chunks[-1]["usageMetadata"]
    assert (usage["candidatesTokenCount"], usage["cachedContentTokenCount"]) == (5, 3)
    assert chunks[-1]["candidates"][0]["tokenCount"] == 5


@pytest.mark.parametrize("alt", ["", "json", "JSON"])
async def test_json_array(harness: Harness, alt: str) -> None:
    response = await harness.stream(HI, alt=alt)
    assert response.headers["content-type"] == "application/json"
    assert response.text.startswith('[{"candidates"')
    assert "},\n{" in response.text
    assert response.text.endswith("}]")
    check_chunks(response.json())


async def test_legacy_query_is_the_json_array(harness: Harness) -> None:
    path = "/v1beta/models/tiny:streamGenerateContent?%24alt=json%3Benum-encoding%3Dint"
    check_chunks((await harness.client.post(path, json=HI)).json())


async def test_a_stream_says_the_same_as_the_whole_answer(harness: Harness) -> None:
    body = {**HI, "generationConfig": {"responseLogprobs": True, "logprobs": 1}}
    harness.engine.answers += [saying("Hello"), saying("Hello")]
    whole = (await harness.generate(body)).json()
    chunks = events_of((await harness.stream(body)).text)
    pieces = [chunk["candidates"][0] for chunk in chunks]
    steps = [step for piece in pieces for step in piece.get("logprobsResult", {}).get("chosenCandidates", [])]
    tops = [step for piece in pieces for step in piece.get("logprobsResult", {}).get("topCandidates", [])]
    result = whole["candidates"][0]["logprobsResult"]
    assert (steps, tops) == (result["chosenCandidates"], result["topCandidates"])
    assert pieces[-1]["avgLogprobs"] == whole["candidates"][0]["avgLogprobs"]
    assert chunks[-1]["usageMetadata"] == whole["usageMetadata"]


async def test_several_candidates_carry_their_index_and_end_once_each(harness: Harness) -> None:
    response = await harness.stream({**HI, "generationConfig": {"candidateCount": 2}})
    pieces = [piece for chunk in events_of(response.text) for piece in chunk["candidates"]]
    for index in (0, 1):
        mine = [piece for piece in pieces if piece["index"] == index]
        assert "".join(piece["content"]["parts"][0]["text"] for piece in mine) == "ok"
        assert [piece.get("finishReason") for piece in mine] == [None, None, "STOP"]


async def test_text_that_is_held_back_makes_no_chunk(harness: Harness) -> None:
    end = [CandidateFinished(0, FinishReason.STOP, 2), RequestFinished(9, 0, 2)]
    harness.engine.answers.append(lambda request: [Delta(0, (5,), ""), Delta(0, (6,), "é"), *end])
    chunks = events_of((await harness.stream(HI)).text)
    assert [chunk["candidates"][0]["content"]["parts"] for chunk in chunks] == [[{"text": "é"}], [{"text": ""}]]
    assert chunks[0]["usageMetadata"]["candidatesTokenCount"] == 2


async def test_json_is_ascii(harness: Harness) -> None:
    end = [CandidateFinished(0, FinishReason.STOP, 1), RequestFinished(9, 0, 1)]
    harness.engine.answers.append(lambda request: [Delta(0, (5,), "a\u2028b\u0085ü😀"), *end])
    response = await harness.stream(HI)
    assert response.content.isascii()
    assert "\\u2028" in response.text
    assert events_of(response.text)[0]["candidates"][0]["content"]["parts"][0]["text"] == "a\u2028b\u0085ü😀"


async def test_an_error_comes_as_an_event_and_bare_as_the_last_bytes_in_a_piece_of_its_own(harness: Harness) -> None:
    harness.engine.answers.append(failing(ErrorKind.UNAVAILABLE, "The engine died.", Delta(0, (5,), "x")))
    call = RawCall(harness.app, SSE, HI)
    assert (await call.next())["status"] == 200
    pieces = []
    while not pieces or pieces[-1]:
        pieces.append((await call.next())["body"])
    assert pieces[0].startswith(b'data: {"candidates"')
    error = b'{"error":{"code":503,"message":"The engine died.","status":"UNAVAILABLE"}}'
    assert pieces[1:] == [b"data: " + error + b"\n\n", error, b""]


@pytest.mark.parametrize("alt", ["sse", ""])
async def test_an_error_after_the_first_byte_is_an_item(harness: Harness, alt: str) -> None:
    harness.engine.answers.append(failing(ErrorKind.UNAVAILABLE, "The engine died.", Delta(0, (5,), "x")))
    response = await harness.stream(HI, alt=alt)
    assert response.status_code == 200
    items = events_of(response.text) if alt else response.json()
    assert len(items) == 2
    assert list(items[1]) == ["error"]
    assert items[1]["error"] == {"code": 503, "message": "The engine died.", "status": "UNAVAILABLE"}


async def test_an_unexpected_failure_after_the_first_byte_tells_nothing(harness: Harness) -> None:
    harness.engine.answers.append(lambda request: [Delta(0, (5,), "x"), ValueError("secret")])
    response = await harness.stream(HI)
    assert events_of(response.text)[1]["error"]["code"] == 500
    assert "secret" not in response.text
    assert harness.engine.cancelled == [harness.engine.requests[0].id]


@pytest.mark.parametrize(("alt", "array"), [("sse", False), ("", True), ("json", True)])
async def test_an_error_before_the_first_byte_has_its_status(harness: Harness, alt: str, array: bool) -> None:
    for body, code in [({"foo": 1}, 400), (HI, 504)]:
        harness.engine.answers.append(failing(ErrorKind.DEADLINE, "late"))
        response = await harness.stream(body, alt=alt)
        found = response.json()
        assert isinstance(found, list) is array
        assert (found[0] if array else found)["error"]["code"] == response.status_code == code


async def test_spaces_within_the_next_item_keep_a_silent_stream_alive(tmp_path: Path) -> None:
    async with serving(tokenizer_folder(tmp_path / "tiny"), keepalive_seconds=0.05) as harness:
        said = saying("ok")
        for alt in ("sse", ""):
            harness.engine.answers.append(lambda request: [p for e in said(request) for p in (Pause(0.3), e)])
            response = await harness.stream(HI, alt=alt)
            assert response.text.startswith("data:   " if alt else "[  ")
            assert len(re.findall(r"  +(?:,\n)?\{", response.text)) == 3
            check_chunks(events_of(response.text) if alt else response.json())


async def test_the_status_is_open_until_the_first_keep_alive(tmp_path: Path) -> None:
    async with serving(tokenizer_folder(tmp_path / "tiny"), keepalive_seconds=3600) as harness:
        harness.engine.answers.append(failing(ErrorKind.DEADLINE, "late", Pause(0.2)))
        assert (await harness.stream(HI)).status_code == 504


async def test_a_failure_after_a_keep_alive_is_an_item(tmp_path: Path) -> None:
    async with serving(tokenizer_folder(tmp_path / "tiny"), keepalive_seconds=0.05) as harness:
        harness.engine.answers.append(failing(ErrorKind.INTERNAL, "oh", Pause(0.2)))
        response = await harness.stream(HI)
        assert response.status_code == 200
        assert response.text.startswith("data:   ")
        assert [item["error"]["code"] for item in events_of(response.text)] == [500]


async def test_chunks_are_sent_as_they_come_and_a_hang_up_ends_them(harness: Harness) -> None:
    harness.engine.answers.append(lambda request: [Delta(0, (5,), "x"), Pause()])
    call = RawCall(harness.app, SSE, HI)
    start = await call.next()
    assert start["status"] == 200
    assert b"content-length" not in dict(start["headers"])
    assert json.loads((await call.next())["body"].removeprefix(b"data: "))["candidates"]
    call.hang_up()
    await call.ended()
    assert harness.engine.cancelled == [harness.engine.requests[0].id]
    assert not harness.engine.open


async def test_cancelling_the_server_task_ends_the_work(harness: Harness) -> None:
    harness.engine.answers.append(lambda request: [Delta(0, (5,), "x"), Pause()])
    call = RawCall(harness.app, SSE, HI)
    assert (await call.next())["status"] == 200
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.task
    assert harness.engine.cancelled == [harness.engine.requests[0].id]
    assert not harness.engine.open

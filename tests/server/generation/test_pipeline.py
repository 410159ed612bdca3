"""The preparation of requests, as callers without HTTP use it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fakes import INFO, Harness, saying, serving, tokenizer_folder

from engine.api.events import Event, RequestFinished
from server.errors import DeadlineExceeded, InvalidArgument
from server.generation.pipeline import LARGE_BYTES, Caller, Incoming, Prepared
from server.wire.message import parse
from server.wire.requests import CountTokensRequest, GenerateContentRequest

HI: dict[str, Any] = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}


@pytest.fixture
async def harness(tmp_path: Path) -> Any:
    async with serving(tokenizer_folder(tmp_path / "tiny")) as started:
        yield started


def incoming(
    body: dict[str, Any], kind: type[GenerateContentRequest] | type[CountTokensRequest] = GenerateContentRequest
) -> Incoming:
    return Incoming(json.dumps(body).encode(), lambda raw: parse(kind, json.loads(raw)))


async def prepared(harness: Harness, body: dict[str, Any], caller: Caller | None = None) -> Prepared:
    (entry,) = harness.services.registry.entries()
    return await harness.services.pipeline.prepare(incoming(body), entry, caller or Caller("me"), time.monotonic() + 60)


def test_it_needs_no_http() -> None:
    code = "import sys, server.generation.pipeline; print({'starlette', 'uvicorn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"


async def test_a_prepared_request_has_all_that_its_answer_needs(harness: Harness) -> None:
    harness.engine.answers.append(saying("Hello", cached=1))
    call = await prepared(harness, {**HI, "labels": {"a": "b"}, "generationConfig": {"candidateCount": 2}})
    assert (call.model, call.request.salt, call.request.candidates) == ("tiny", "me", 2)
    assert call.ignored == ("labels",)
    seen: list[Event] = []
    answer = await call.whole(seen.append)
    assert [candidate["content"]["parts"] for candidate in answer["candidates"]] == [[{"text": "Hello"}]] * 2
    assert answer["usageMetadata"]["promptTokenCount"] == len(call.request.prompt)
    assert isinstance(seen[-1], RequestFinished)


async def test_one_engine_request_for_each_answer_also_in_chunks(harness: Harness) -> None:
    call = await prepared(harness, HI)
    chunks = [chunk async for chunk in call.chunks(lambda event: None)]
    assert [request.id for request in harness.engine.requests] == [call.request.id] == [chunks[-1]["responseId"]]
    assert harness.engine.cancelled == []


async def test_the_count_is_the_length_of_the_prompt(harness: Harness) -> None:
    (entry,) = harness.services.registry.entries()
    call = await prepared(harness, HI)
    counted = await harness.services.pipeline.count(
        incoming(HI, CountTokensRequest), entry, Caller(), time.monotonic() + 60
    )
    assert counted == (len(call.request.prompt), 0)


async def test_ignored_fields_are_known_although_the_request_fails_later(harness: Harness) -> None:
    caller = Caller()
    with pytest.raises(InvalidArgument, match="exceeds the maximum number of tokens"):
        await prepared(harness, {"contents": "x" * INFO.max_context, "labels": {"a": "b"}}, caller)
    assert caller.ignored == ["labels"]


async def test_a_prompt_beyond_the_context_says_what_limits_it(harness: Harness) -> None:
    harness.engine.info = replace(INFO, context_limit="its rotary embedding is dynamic")
    for length in (INFO.max_context, 100 * INFO.max_context):
        with pytest.raises(InvalidArgument, match=r"\(511\).* holds no more: its rotary embedding is dynamic\.$"):
            await prepared(harness, {"contents": "x" * length})


async def test_a_large_request_is_prepared_like_a_small_one(harness: Harness) -> None:
    (entry,) = harness.services.registry.entries()
    deadline = time.monotonic() + 60
    small, large = incoming(HI), incoming({**HI, "labels": {"a": "x" * LARGE_BYTES}})
    assert (small.is_large, large.is_large) == (False, True)
    pipeline = harness.services.pipeline
    prompts = [(await pipeline.prepare(it, entry, Caller(), deadline)).request.prompt for it in (small, large)]
    assert prompts[0] == prompts[1]


async def test_the_deadline_holds_for_the_preparation(harness: Harness) -> None:
    (entry,) = harness.services.registry.entries()
    with pytest.raises(DeadlineExceeded):
        await harness.services.pipeline.prepare(incoming(HI), entry, Caller(), time.monotonic() - 1)

"""Requests leave nothing behind that only a garbage collection can free: the server runs hardly any
(`server.http.serving`), and what a request held may be 20 MiB."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.fakes import Harness, Pause, RawCall, serving, tokenizer_folder

HI = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}
LARGE = {"contents": [{"role": "user", "parts": [{"text": "hi " * 30_000}]}]}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "not": {"const": "x"}}}}
SHAPED = {**HI, "generationConfig": {"responseMimeType": "application/json", "responseJsonSchema": SCHEMA}}
WRONG = {"contents": [{"role": "nobody", "parts": [{"texxt": "hi"}]}], "foo": 1}
REQUESTS = 20


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    async with serving(tokenizer_folder(tmp_path / "tiny")) as harness:
        yield harness


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("tiny:generateContent", HI, 200),
        ("tiny:streamGenerateContent?alt=sse", HI, 200),
        ("tiny:generateContent", LARGE, 400),
        ("tiny:generateContent", SHAPED, 200),
        ("tiny:generateContent", WRONG, 400),
        ("tiny:countTokens", HI, 200),
        ("none:generateContent", HI, 404),
    ],
)
async def test_answers_leave_no_garbage(harness: Harness, path: str, body: Any, status: int) -> None:
    async def ask() -> None:
        call = RawCall(harness.app, f"/v1beta/models/{path}", body)
        await call.ended()
        assert (await call.next())["status"] == status

    assert await garbage_of(ask) < REQUESTS


async def test_a_refusal_leaves_no_garbage(harness: Harness) -> None:
    harness.engine.full = True

    async def ask() -> None:
        call = RawCall(harness.app, "/v1beta/models/tiny:generateContent", LARGE)
        await call.ended()
        assert (await call.next())["status"] == 429

    assert await garbage_of(ask) < REQUESTS


@pytest.mark.parametrize("method", ["generateContent", "streamGenerateContent"])
async def test_a_client_that_hangs_up_leaves_no_garbage(harness: Harness, method: str) -> None:
    async def ask() -> None:
        harness.engine.answers.append(lambda request: [Pause()])
        call = RawCall(harness.app, f"/v1beta/models/tiny:{method}", HI)
        call.hang_up()
        await call.ended()
        harness.engine.answers.clear()

    assert await garbage_of(ask) < REQUESTS


async def garbage_of(ask: Any) -> int:
    """The objects in cycles that so many calls leave behind."""
    await ask()
    gc.collect()
    gc.disable()
    try:
        for _ in range(REQUESTS):
            await ask()
        return gc.collect()
    finally:
        gc.enable()

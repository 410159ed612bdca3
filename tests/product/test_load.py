"""Many streams at once, hang-ups in the middle, and an engine that is killed: nobody else notices, nothing is left."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.server import RunningServer, running_server
from support.waiting import wait_until

pytestmark = pytest.mark.product

MODEL = "smollm2-135m-instruct"
STREAMS = 32


@pytest.fixture(scope="module")
def castor(builtin_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of its own: these tests kill its engine."""
    with running_server(tmp_path_factory.mktemp("load")) as server:
        yield server


def body(index: int, max_tokens: int) -> dict[str, Any]:
    """Stream ``index``: prompts of mixed lengths, even ones greedy, odd ones sampled."""
    text = f"Tell me a story about the number {index} and a dragon. " * (1 + index % 5)
    config = {"temperature": 0 if index % 2 == 0 else 0.9, "seed": index, "maxOutputTokens": max_tokens}
    return {"contents": [{"parts": [{"text": text}]}], "generationConfig": config}


@dataclass
class Outcome:
    text: str = ""
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    terminals: int = 0
    chunks: int = field(default=0)


def stream(castor: RunningServer, index: int, max_tokens: int = 24, hang_up_after: int | None = None) -> Outcome:
    outcome = Outcome()
    path = f"{castor.url}/v1beta/models/{MODEL}:streamGenerateContent?alt=sse"
    with httpx.stream("POST", path, json=body(index, max_tokens), timeout=120) as response:
        if response.status_code != 200:
            response.read()
            return Outcome(error=response.json()["error"], terminals=1)
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue  # an error comes once more, bare
            event = json.loads(line.removeprefix("data: "))
            outcome.chunks += 1
            if "error" in event:
                outcome.error = event["error"]
                outcome.terminals += 1
                continue
            candidate = event["candidates"][0]
            outcome.text += "".join(part["text"] for part in candidate["content"]["parts"])
            if "finishReason" in candidate:
                outcome.finish_reason = candidate["finishReason"]
                outcome.terminals += 1
            if hang_up_after is not None and outcome.chunks >= hang_up_after:
                break
    return outcome


def wait_until_idle(castor: RunningServer, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    names = ("castor_sequences_running", "castor_sequences_waiting", "castor_kv_blocks_used")
    while any(castor.metric(name) for name in names):
        assert time.monotonic() < deadline, {name: castor.metric(name) for name in names}
        time.sleep(0.2)


def test_half_of_32_streams_hang_up_and_the_rest_are_unaffected(castor: RunningServer) -> None:
    kept = range(0, STREAMS, 2)
    alone = {index: stream(castor, index).text for index in (0, 6, 12, 18)}
    with ThreadPoolExecutor(STREAMS) as pool:
        futures = [
            pool.submit(stream, castor, index, 24, None if index in kept else 1 + index % 6) for index in range(STREAMS)
        ]
        outcomes = [future.result() for future in futures]
    for index in kept:
        assert outcomes[index].terminals == 1
        assert outcomes[index].finish_reason in ("STOP", "MAX_TOKENS")
    assert {index: outcomes[index].text for index in alone} == alone
    wait_until_idle(castor)


def test_a_killed_engine_ends_every_stream_once_and_service_comes_back(castor: RunningServer) -> None:
    (pid,) = castor.engine_pids()
    restarts = castor.metric("castor_engine_restarts_total")

    def kill() -> None:
        wait_until(lambda: castor.metric("castor_sequences_running") >= STREAMS // 2)
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with ThreadPoolExecutor(STREAMS) as pool:
        outcomes = list(pool.map(lambda index: stream(castor, index, max_tokens=2000), range(STREAMS)))
    killer.join()
    assert [outcome.terminals for outcome in outcomes] == [1] * STREAMS
    assert {outcome.error["code"] for outcome in outcomes if outcome.error} == {503}
    assert sum(outcome.error is not None for outcome in outcomes) >= STREAMS // 2
    assert castor.client.get("/healthz").status_code == 200
    castor.wait_until_ready()
    assert castor.engine_pids() != [pid]
    assert stream(castor, 0).finish_reason == "MAX_TOKENS"
    assert castor.metric("castor_engine_restarts_total") == restarts + 1
    wait_until_idle(castor)


def test_a_hung_up_call_without_streaming_is_cancelled(castor: RunningServer) -> None:
    path = f"{castor.url}/v1beta/models/{MODEL}:generateContent"
    # Noise hardly ever ends by itself, and eight times not at once.
    noise = {"maxOutputTokens": 2000, "temperature": 2, "topP": 1, "topK": 40_000, "candidateCount": 8}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(path, json={**body(1, 2000), "generationConfig": noise}, timeout=httpx.Timeout(60, read=0.3))
    wait_until_idle(castor)

"""Alive, ready, measured."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.fakes import ScriptedEngine, serving, tokenizer_folder

from server.app import create_app
from server.config.models_file import ModelSpec
from server.config.settings import Settings
from server.convert.chat_tokenizer import ChatTokenizer
from server.models.registry import Registry


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tokenizer_folder(tmp_path)


async def test_healthz_answers_whatever_the_models_do(folder: Path) -> None:
    async with serving(folder) as server:
        server.engine.info = None
        answer = await server.client.get("/healthz")
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")
    assert answer.json()["version"]


async def test_readyz_tells_each_model_until_all_required_can_answer(folder: Path) -> None:
    specs = [ModelSpec("now", str(folder)), ModelSpec("later", str(folder), load="request")]
    async with serving(folder, specs) as server:
        ready = await server.client.get("/readyz")
        info, server.engine.info = server.engine.info, None
        loading = await server.client.get("/readyz")
        server.engine.info = info
        server.services.draining.set()
        draining = await server.client.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    assert ready.json()["models"]["later"]["state"] == "stopped"
    assert (loading.status_code, loading.json()["status"]) == (503, "loading")
    assert set(loading.json()["models"]["now"]) == {"state", "detail", "progress", "load"}
    assert loading.json()["models"]["now"]["state"] == "loading"
    assert (draining.status_code, draining.json()["status"]) == (503, "draining")


async def test_readyz_has_what_failed_tried_again(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    registry = Registry(
        [ModelSpec("tiny", str(folder))],
        folder,
        start_engine=lambda config, name: ScriptedEngine(),
        read_tokenizer=ChatTokenizer,
        rest_seconds=0,
    )
    app = create_app(Settings(folder, folder), registry)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")

    async def told(state: str) -> httpx.Response:
        while True:
            answer = await client.get("/readyz")
            if answer.json()["models"]["tiny"]["state"] == state:
                return answer
            await asyncio.sleep(0.01)

    async with app.router.lifespan_context(app), client, asyncio.timeout(60):
        failed = await told("failed")
        tokenizer_folder(folder)
        ready = await told("ready")
    assert (failed.status_code, ready.status_code) == (503, 200)
    assert "the tokenizer of tiny cannot be loaded" in failed.json()["models"]["tiny"]["detail"]


async def test_readyz_tells_strangers_nothing_but_the_status(folder: Path) -> None:
    async with serving(folder, api_keys=("sesame",)) as server:
        for headers in ({}, {"x-goog-api-key": "wrong"}):
            ready = await server.client.get("/readyz", headers=headers)
            assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
        server.engine.info = None
        loading = await server.client.get("/readyz")
        known = [
            await server.client.get("/readyz", headers={"x-goog-api-key": "sesame"}),
            await server.client.get("/readyz", headers={"authorization": "Bearer sesame"}),
            await server.client.get("/readyz?key=sesame"),
        ]
    assert (loading.status_code, loading.json()) == (503, {"status": "loading"})
    for answer in known:
        assert (answer.status_code, answer.json()["status"]) == (503, "loading")
        assert answer.json()["models"]["tiny"]["state"] == "loading"


async def test_metrics_are_in_prometheus_text_format(folder: Path) -> None:
    async with serving(folder) as server:
        await server.generate({"contents": [{"parts": [{"text": "hi"}]}]})
        for name in ("a", "b", "c"):
            await server.client.get(f"/v1beta/models/{name}")
        answer = await server.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    requests = {tuple(sample.labels.values()): sample.value for sample in families["castor_requests"].samples}
    assert requests[("200", "generateContent", "tiny")] == 1
    assert {labels[2] for labels in requests} <= {"", "tiny"}, "names that do not exist are no labels"
    assert families["castor_kv_blocks_total"].samples[0].labels == {"model": "tiny"}
    assert families["castor_requests_in_progress"].samples[0].value == 1, "the scrape itself"

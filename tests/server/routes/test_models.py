"""GET models and GET models/{model}."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.fakes import Harness, serving, tokenizer_folder

from server.config.models_file import ModelSpec


@pytest.fixture
async def many(tmp_path: Path) -> AsyncIterator[Harness]:
    folder = tokenizer_folder(tmp_path / "tiny")
    specs = [ModelSpec(f"m{index}", str(folder), load="request") for index in range(5)]
    async with serving(folder, specs) as harness:
        yield harness


async def test_a_model(harness: Harness) -> None:
    response = await harness.client.get("/v1/models/tiny")
    assert response.json() == {
        "name": "models/tiny",
        "baseModelId": "tiny",
        "version": "local",
        "displayName": "tiny",
        "description": "",
        "inputTokenLimit": 511,
        "outputTokenLimit": 100,
        "supportedGenerationMethods": ["generateContent", "countTokens"],
        "temperature": 1.0,
        "maxTemperature": 2.0,
        "topP": 1.0,
        "topK": 0,
        "thinking": False,
    }
    assert (await harness.client.get("/genai/v1beta/models/gemini-2.5-flash")).json() == response.json()


async def test_the_defaults_of_an_entry(tmp_path: Path) -> None:
    """Those that requests can override; the others have no field in a Model."""
    folder = tokenizer_folder(tmp_path / "tiny")
    spec = ModelSpec("m", str(folder), temperature=0.7, top_p=0.9, top_k=5, min_p=0.05, repetition_penalty=1.1)
    async with serving(folder, [spec]) as harness:
        model = (await harness.client.get("/v1/models/m")).json()
    assert list(model)[-4:] == ["temperature", "maxTemperature", "topP", "topK"]
    assert list(model.values())[-4:] == [0.7, 2.0, 0.9, 5]


async def test_the_defaults_that_the_model_brings(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "tiny")
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "top_p": 7, "do_sample": true}')
    async with serving(folder, [ModelSpec("m", str(folder), top_k=5)]) as harness:
        model = (await harness.client.get("/v1/models/m")).json()
        assert list(model.values())[-4:] == [0.6, 2.0, 1.0, 5]
        asked = {"contents": [{"parts": [{"text": "hi"}]}]}
        await harness.client.post("/v1/models/m:generateContent", json=asked)
        await harness.client.post("/v1/models/m:generateContent", json=asked | {"generationConfig": {"topK": 3}})
    plain, named = (request.sampling for request in harness.engine.requests)
    assert (plain.temperature, plain.top_p, plain.top_k) == (0.6, 1.0, 5)
    assert (named.temperature, named.top_p, named.top_k) == (0.6, 1.0, 3)


async def test_real_names_only_are_listed(harness: Harness) -> None:
    listed = (await harness.client.get("/v1alpha/models")).json()
    assert [model["name"] for model in listed["models"]] == ["models/tiny"]
    assert "nextPageToken" not in listed


async def test_a_model_that_loads_is_listed_with_what_is_known(harness: Harness) -> None:
    harness.engine.info = None
    model = (await harness.client.get("/v1/models/tiny")).json()
    assert "inputTokenLimit" not in model
    assert model["outputTokenLimit"] == 100
    assert model["supportedGenerationMethods"]


async def test_paging(many: Harness) -> None:
    names, token, pages = [], "", 0
    while True:
        page = (await many.client.get("/v1/models", params={"pageSize": "2", "pageToken": token})).json()
        names += [model["name"] for model in page["models"]]
        pages += 1
        token = page.get("nextPageToken", "")
        if not token:
            break
    assert names == [f"models/m{index}" for index in range(5)]
    assert pages == 3


@pytest.mark.parametrize(
    "query", ["pageToken=zzz", "pageToken=%00", "pageToken=bW9kZWxzOjk5", "pageSize=-1", "pageSize=x"]
)
async def test_bad_pages(many: Harness, query: str) -> None:
    response = await many.client.get(f"/v1/models?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["status"] == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    "query", ["pageSize=0", "pageSize=9999999999", "page_size=2000&%24alt=json%3Benum-encoding%3Dint"]
)
async def test_odd_pages(many: Harness, query: str) -> None:
    assert len((await many.client.get(f"/v1/models?{query}")).json()["models"]) == 5


async def test_an_unknown_model(harness: Harness) -> None:
    response = await harness.client.get("/v1/models/nobody")
    assert response.status_code == 404
    assert response.json()["error"]["status"] == "NOT_FOUND"
    assert "ListModels" in response.json()["error"]["message"]

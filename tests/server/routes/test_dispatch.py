"""Paths: prefixes, versions, names of every shape, and what is not served."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fakes import Harness, serving, tokenizer_folder

from server.config.models_file import ModelSpec

HI = {"contents": [{"parts": [{"text": "hi"}]}]}


@pytest.mark.parametrize("prefix", ["", "/genai"])
@pytest.mark.parametrize("version", ["/v1beta", "/v1", "/v1alpha", "/v2main", ""])
async def test_every_prefix_and_version(harness: Harness, prefix: str, version: str) -> None:
    base = f"{prefix}{version}"
    assert (await harness.client.get(f"{base}/models")).status_code == 200
    assert (await harness.client.get(f"{base}/models/tiny")).status_code == 200
    assert (await harness.client.post(f"{base}/models/tiny:generateContent", json=HI)).status_code == 200
    assert (await harness.client.post(f"{base}/models/tiny:countTokens", json=HI)).status_code == 200


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("org/repo", "models/org/repo"),
        ("org/repo", "org/repo"),
        ("repo:4bit", "models/repo:4bit"),
        ("plain", "models/plain"),
        ("plain", "plain"),
        ("plain", "models/alias/of:it"),
    ],
)
async def test_names_with_slashes_and_colons(tmp_path: Path, name: str, path: str) -> None:
    folder = tokenizer_folder(tmp_path / "tiny")
    spec = ModelSpec(name, str(folder), aliases=("alias/of:it",))
    async with serving(folder, [spec]) as harness:
        response = await harness.client.post(f"/v1beta/{path}:generateContent", json=HI)
        assert response.json()["modelVersion"] == name
        if path.startswith("models/"):
            assert (await harness.client.get(f"/v1beta/{path}")).json()["name"] == f"models/{name}"


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("POST", "/v1beta/models/nobody:generateContent", 404),
        ("POST", "/v1beta/tunedModels/x:generateContent", 404),
        ("POST", "/v1beta/models/tiny:fly", 404),
        ("GET", "/v1beta/models/tiny:generateContent", 405),
        ("DELETE", "/v1beta/models", 405),
        ("PATCH", "/v1beta/models/tiny", 405),
        ("POST", "/v1beta/models/tiny:batchEmbedContents", 501),
        ("POST", "/v1beta/models/tiny:batchGenerateContent", 501),
        ("GET", "/v1/tunedModels", 501),
        ("POST", "/upload/v1beta/files", 400),
        ("POST", "/upload/v1%E4%B8%AD/files", 501),
        ("DELETE", "/v1/cachedContents/abc", 501),
        ("POST", "/v1/interactions", 501),
        ("POST", "/v1/batches/b1:cancel", 501),
        ("GET", "/v1beta/nothing", 404),
        ("GET", "/", 404),
        ("POST", "/v1beta/", 404),
        ("POST", "/v1beta/:generateContent", 404),
        ("POST", "/v1beta/models/:generateContent", 404),
    ],
)
async def test_what_is_not_there(harness: Harness, method: str, path: str, code: int) -> None:
    for prefix in ("", "/genai"):
        response = await harness.client.request(method, f"{prefix}{path}")
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (code, code)
        assert error["message"]
        assert error["status"]


async def test_the_other_http_method_is_named(harness: Harness) -> None:
    response = await harness.client.get("/v1/models/tiny:countTokens")
    assert response.headers["allow"] == "POST"
    response = await harness.client.put("/v1beta/files/abc")
    assert response.headers["allow"] == "GET, DELETE"
    assert response.json()["error"]["message"] == "PUT is not allowed for /v1beta/files/abc; use GET or DELETE"


async def test_an_unserved_method_is_named(harness: Harness) -> None:
    response = await harness.client.post("/v1/models/tiny:embedContent", json={})
    assert response.json()["error"]["message"] == "models.embedContent is not served by this server."
    assert response.json()["error"]["status"] == "UNIMPLEMENTED"

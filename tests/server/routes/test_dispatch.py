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


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1beta/openai/chat/completions"),
        ("POST", "/v1beta/openai/"),
        ("GET", "/v1beta/openai/models/tiny"),
        ("DELETE", "/genai/v1/openai/files/x"),
        ("POST", "/v1beta1/projects/p/locations/l/endpoints/openapi/chat/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/chat/completions"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/images/generations"),
        ("POST", "/a/proxy/v1/audio/speech"),
    ],
)
async def test_clients_of_openai_read_why_it_is_not_served(harness: Harness, method: str, path: str) -> None:
    """Their SDKs show ``error.message`` of an object, and its ``type`` and ``code``; a list or another form is shown as
    a whole body at best."""
    answer = await harness.client.request(method, path, json={"model": "tiny", "messages": []})
    assert answer.status_code == 501
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    assert "belongs to OpenAI's API, which is not served" in error["message"]
    assert "v1beta/models/MODEL:generateContent" in error["message"]
    assert answer.headers["x-should-retry"] == "false"
    metrics = (await harness.client.get("/metrics")).text
    assert 'castor_requests_total{code="501",method="",model=""} 1.0' in metrics


@pytest.mark.parametrize(
    "path",
    [
        "/ws/google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateContent",
        "/genai/ws/google.ai.generativelanguage.v1alpha.GenerativeService.BidiGenerateContentConstrained",
        "/v1beta/ws/google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateMusic",
        "/ws/google.cloud.aiplatform.v1beta1.LlmBidiService/BidiGenerateContent",
    ],
)
async def test_a_live_socket_is_refused_at_its_handshake(harness: Harness, path: str) -> None:
    handshake = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    answer = await harness.client.get(path, headers=handshake | {"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="})
    assert (answer.status_code, answer.json()["error"]["status"]) == (501, "UNIMPLEMENTED")
    assert "Live API" in answer.json()["error"]["message"]


async def test_a_path_that_is_not_there_tells_how_it_was_read(harness: Harness) -> None:
    answer = await harness.client.get("/some/proxy/v1/v1beta//nothing/")
    message = answer.json()["error"]["message"]
    assert message.startswith(
        "The requested URL /some/proxy/v1/v1beta/nothing/ (read as /v1beta/nothing) was not found"
    )
    assert "A base URL ends before the version" in message
    assert len((await harness.client.get("/v1beta/" + "x" * 9000)).text) < 1000

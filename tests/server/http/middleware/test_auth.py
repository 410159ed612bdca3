"""API keys: three ways to send one, and what is said about none and about a wrong one."""

from __future__ import annotations

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs

from server.http.middleware.auth import AuthMiddleware
from server.http.middleware.record import RecordMiddleware
from server.observability.metrics import Metrics


async def tell_identity(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse(Request(scope).state.identity)(scope, receive, send)


def client(*keys: str) -> httpx.AsyncClient:
    app = RecordMiddleware(AuthMiddleware(tell_identity, keys), Metrics(list, "1"))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost")


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("", {"x-goog-api-key": "sesame"}),
        ("", {"x-goog-api-key": " sesame "}),
        ("?alt=sse&key=sesame", {}),
        ("", {"authorization": "Bearer sesame"}),
        ("", {"authorization": "bearer sesame"}),
        ("", {"x-goog-api-key": "sesame", "authorization": "Bearer sesame"}),
        ("", {"x-goog-api-key": "", "authorization": "Bearer sesame"}),
    ],
)
async def test_a_key_may_be_sent_in_three_ways(query: str, headers: dict[str, str]) -> None:
    async with client("other", "sesame") as http:
        answer = await http.get(f"/v1/models{query}", headers=headers)
    assert answer.status_code == 200
    assert len(answer.text) == 32
    assert "sesame" not in answer.text


async def test_identity_is_stable_and_differs_between_keys() -> None:
    async with client("a", "b") as http, client("b") as restarted:
        identities = [(await http.get("/", headers={"x-goog-api-key": key})).text for key in "ab"]
        again = (await restarted.get("/?key=b")).text
    assert identities[0] != identities[1] == again


@pytest.mark.parametrize("headers", [{}, {"x-goog-api-key": ""}, {"authorization": "Basic c2VzYW1l"}])
async def test_no_key_is_403(headers: dict[str, str]) -> None:
    async with client("sesame") as http:
        answer = await http.get("/v1/models?key=", headers=headers)
    assert answer.status_code == 403
    assert answer.json()["error"]["status"] == "PERMISSION_DENIED"


@pytest.mark.parametrize("key", ["wrong", "sesam", "sesame1", "s\xe9same"])
async def test_a_wrong_key_is_400_as_the_real_service_says_it(key: str) -> None:
    async with client("sesame") as http:
        answer = await http.get("/v1/models", headers=[(b"x-goog-api-key", key.encode("latin-1"))])
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["status"]) == (400, 400, "INVALID_ARGUMENT")
    assert error["message"] == "API key not valid. Please pass a valid API key."
    assert error["details"][0]["reason"] == "API_KEY_INVALID"
    assert key not in answer.text


async def test_a_key_outside_ascii_works() -> None:
    async with client("schlüssel") as http:
        header = await http.get("/", headers=[(b"x-goog-api-key", "schlüssel".encode())])
        query = await http.get("/", params={"key": "schlüssel"})
    assert header.status_code == query.status_code == 200


@pytest.mark.parametrize("query", [b"key=%FF%00", b"key=%", b"&&;=key", b"key=%uD800"])
async def test_queries_of_any_bytes_are_only_wrong(query: bytes) -> None:
    async with client("sesame") as http:
        answer = await http.get(httpx.URL("/v1/models").copy_with(query=query))
    assert answer.status_code in (400, 403)


@pytest.mark.parametrize(("path", "status"), [("/healthz", 200), ("/readyz", 200), ("/metrics", 403), ("/", 403)])
async def test_only_probes_are_open(path: str, status: int) -> None:
    async with client("sesame") as http:
        assert (await http.get(path)).status_code == status


async def test_without_keys_any_key_is_ignored() -> None:
    async with client() as http:
        answer = await http.get("/v1/models", headers={"x-goog-api-key": "whatever"})
    assert (answer.status_code, answer.text) == (200, "")


async def test_refusals_are_logged_without_the_key() -> None:
    with capture_logs() as lines:
        async with client("sesame") as http:
            await http.get("/v1/models?key=guess-1", headers={"x-goog-api-key": "guess-2"})
    (line,) = lines
    assert (line["status"], line["path"]) == (400, "/v1/models")
    assert "guess" not in str(line)

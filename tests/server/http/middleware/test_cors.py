"""Web pages of allowed origins: preflights, private networks, and errors that a page can read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.fakes import Harness, serving, tokenizer_folder

from engine.api.errors import Overloaded

HI = {"contents": [{"parts": [{"text": "hi"}]}]}
PAGE = "https://chat.example"
GENERATE = "/v1beta/models/tiny:generateContent"
KEY = {"x-goog-api-key": "good"}
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "content-type,x-goog-api-key,x-goog-api-client",
}
PRIVATE = {"access-control-request-private-network": "true"}


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    folder = tokenizer_folder(tmp_path / "t")
    async with serving(folder, cors_origins=(PAGE,), api_keys=("good",), max_body_bytes=2000) as started:
        yield started


@pytest.mark.parametrize("origin", [PAGE, "https://evil.example", "null"])
async def test_a_private_network_is_open_to_allowed_origins(harness: Harness, origin: str) -> None:
    answer = await harness.client.options(GENERATE, headers=PREFLIGHT | PRIVATE | {"origin": origin})
    allowed = {name: value for name, value in answer.headers.items() if name.startswith("access-control-allow-")}
    if origin == PAGE:
        assert answer.status_code == 200
        assert allowed["access-control-allow-origin"] == PAGE
        assert allowed["access-control-allow-private-network"] == "true"
        assert "x-goog-api-key" in allowed["access-control-allow-headers"]
    else:
        assert (answer.status_code, allowed) == (400, {})


async def test_only_who_asks_is_told_of_private_networks(harness: Harness) -> None:
    answer = await harness.client.options(GENERATE, headers=PREFLIGHT | {"origin": PAGE})
    assert answer.status_code == 200
    assert "access-control-allow-private-network" not in answer.headers


async def test_every_origin_where_all_are_allowed(tmp_path: Path) -> None:
    async with serving(tokenizer_folder(tmp_path / "t"), cors_origins=("*",)) as harness:
        headers = PREFLIGHT | PRIVATE | {"origin": "https://any.example"}
        answer = await harness.client.options(GENERATE, headers=headers)
    assert answer.headers["access-control-allow-private-network"] == "true"
    assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    ("method", "path", "key", "options", "status"),
    [
        ("POST", GENERATE, KEY, {"json": HI}, 200),
        ("POST", GENERATE, {"x-goog-api-key": "bad"}, {"json": HI}, 400),
        ("POST", GENERATE, {}, {"json": HI}, 403),
        ("GET", "/v1beta/files/nothere", KEY, {}, 403),
        ("POST", "/v1beta/models/nobody:generateContent", KEY, {"json": HI}, 404),
        ("GET", "/nothing", KEY, {}, 404),
        ("DELETE", "/v1beta/models", KEY, {}, 405),
        ("POST", GENERATE, KEY, {"content": b" " * 3000}, 413),
        ("POST", "/v1beta/models/tiny:streamGenerateContent", KEY, {"json": HI}, 429),
        ("GET", "/v1beta/cachedContents", KEY, {}, 501),
        ("GET", "/v1beta/openai/models", KEY, {}, 501),
    ],
)
async def test_a_page_can_read_every_answer(
    harness: Harness, method: str, path: str, key: dict[str, str], options: dict[str, Any], status: int
) -> None:
    harness.engine.refusal = Overloaded("full") if status == 429 else None
    answer = await harness.client.request(method, path, headers=key | {"origin": PAGE}, **options)
    assert answer.status_code == status, answer.text
    assert answer.headers["access-control-allow-origin"] == PAGE
    exposed = answer.headers["access-control-expose-headers"].lower().split(", ")
    assert {"x-castor-ignored", "x-request-id", "x-goog-upload-url", "retry-after"} <= set(exposed)
    foreign = await harness.client.request(method, path, headers=key | {"origin": "https://evil.example"}, **options)
    assert "access-control-allow-origin" not in foreign.headers

"""Web pages must not use a server without keys, whichever way they reach it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse

from server.middleware.host import HostMiddleware
from server.middleware.record import RecordMiddleware
from server.observe import Metrics
from server.settings import Settings


async def status(name: str, origin: str | None = None, **options: Any) -> int:
    """The status of a request with this Host and Origin."""
    settings = Settings(Path(), Path(), **options)
    app = RecordMiddleware(HostMiddleware(PlainTextResponse("in"), settings), Metrics(list, "1"))
    headers = {"host": name} | ({"origin": origin} if origin is not None else {})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://x") as http:
        answer = await http.post("/", headers=headers)
    if answer.status_code != 200:
        assert answer.json()["error"]["status"] == "PERMISSION_DENIED"
        assert "CASTOR_" in answer.json()["error"]["message"], "the setting to change is named"
    return answer.status_code


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]:8080", "[::1]", "127.0.0.2"])
async def test_names_of_this_machine_pass(host: str) -> None:
    assert await status(host) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.org", "evil.org:8080", "localhost.evil.org", "127.0.0.1.evil.org", "", "[::1", "a@b:c", "10.0.0.1"],
)
async def test_a_name_that_was_bent_to_the_loopback_does_not(host: str) -> None:
    assert await status(host) == 403


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://localhost:3000", 200),
        ("https://127.0.0.1", 200),
        ("http://[::1]:5173", 200),
        ("https://evil.org", 403),
        ("http://localhost.evil.org", 403),
        ("null", 403),
        ("", 403),
        ("file://", 403),
    ],
)
async def test_only_pages_of_this_machine_may_call(origin: str, expected: int) -> None:
    assert await status("localhost:8080", origin) == expected


async def test_what_the_settings_allow_passes() -> None:
    assert await status("box.lan:8080", allowed_hosts=("Box.lan",)) == 200
    assert await status("box.lan", "http://box.lan", allowed_hosts=("box.lan",)) == 200
    assert await status("localhost", "https://app.org", cors_origins=("https://app.org",)) == 200
    assert await status("localhost", "https://other.org", cors_origins=("https://app.org",)) == 403
    assert await status("localhost", "https://other.org", cors_origins=("*",)) == 200
    assert await status("evil.org", "https://other.org", cors_origins=("*",)) == 403


async def test_it_rests_where_keys_or_the_operator_decide() -> None:
    assert await status("evil.org", "https://evil.org", api_keys=("k",)) == 200
    assert await status("box.lan", host="0.0.0.0", allow_no_keys=True) == 200
    assert await status("evil.org", host="0.0.0.0", allow_no_keys=True, allowed_hosts=("box.lan",)) == 403

"""Web pages must not use a server without keys, whichever way they reach it."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp

from server.config.settings import Settings
from server.http.connection import BoundedHttp
from server.http.middleware.forwarded import ForwardedMiddleware
from server.http.middleware.host import HostMiddleware
from server.http.middleware.record import RecordMiddleware
from server.observability.metrics import Metrics


def guarded(settings: Settings) -> ASGIApp:
    """An app behind the layers that matter here, in their order."""
    app = RecordMiddleware(HostMiddleware(PlainTextResponse("in"), settings), Metrics(list, "1"))
    return ForwardedMiddleware(app, settings.trusted_proxies)


async def status(name: str, *origins: str, said: dict[str, str] | None = None, **options: Any) -> int:
    """The status of a request with this Host, these Origins and what a proxy ``said``."""
    headers = [("host", name), *(("origin", origin) for origin in origins), *(said or {}).items()]
    transport = httpx.ASGITransport(app=guarded(Settings(Path(), Path(), **options)), client=("10.0.0.7", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
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


OWN = {"host": "127.0.0.1"}
OPEN = {"host": "0.0.0.0", "allow_no_keys": True}
NAMED = OPEN | {"allowed_hosts": ("localhost",)}


@pytest.mark.parametrize("options", [OWN, OPEN, NAMED])
@pytest.mark.parametrize(
    ("host", "origin", "expected"),
    [
        ("localhost:8080", "http://localhost:8080", 200),
        ("LOCALHOST:8080", "http://localhost:8080", 200),
        ("[::1]:8080", "http://[::1]:8080", 200),
        ("localhost", "http://localhost", 200),
        ("localhost:80", "http://localhost", 200),
        ("localhost", "http://localhost:80", 200),
        ("localhost:8080", "http://localhost:3000", 403),
        ("localhost:8080", "http://localhost", 403),
        ("localhost", "https://localhost", 403),
        ("localhost:443", "https://localhost", 403),
        ("localhost:8080", "http://127.0.0.1:8080", 403),
        ("localhost:8080", "http://[::1]:5173", 403),
        ("localhost:8080", "https://evil.org", 403),
        ("localhost:8080", "http://localhost.evil.org:8080", 403),
        ("localhost:8080", "http://localhost:99999", 403),
        ("localhost:8080", "http://[", 403),
        ("localhost:8080", "null", 403),
        ("localhost:8080", "", 403),
        ("localhost:8080", "file://", 403),
    ],
)
async def test_only_pages_of_the_server_itself_may_call(
    options: dict[str, Any], host: str, origin: str, expected: int
) -> None:
    assert await status(host, origin, **options) == expected
    assert await status(host, **options) == 200, "a program sends no Origin"


async def test_of_several_origins_each_must_be_allowed() -> None:
    assert await status("localhost", "http://localhost", "https://evil.org") == 403


async def test_what_the_settings_allow_passes() -> None:
    assert await status("box.lan:8080", allowed_hosts=("Box.lan",)) == 200
    assert await status("box.lan", "http://box.lan", allowed_hosts=("box.lan",)) == 200
    assert await status("localhost:8080", "http://localhost:3000", cors_origins=("http://localhost:3000",)) == 200
    assert await status("localhost", "https://app.org", cors_origins=("https://app.org",)) == 200
    assert await status("localhost", "https://other.org", cors_origins=("https://app.org",)) == 403
    assert await status("localhost", "https://other.org", cors_origins=("*",)) == 200
    assert await status("evil.org", "https://other.org", cors_origins=("*",)) == 403


async def test_behind_a_trusted_proxy_the_origin_is_what_the_client_sees() -> None:
    said = {"x-forwarded-proto": "https", "x-forwarded-host": "llm.example.org"}
    proxied: dict[str, Any] = OPEN | {"said": said}
    origin = "https://llm.example.org"
    assert await status("inner:8080", origin, **proxied, trusted_proxies=("10.0.0.0/8",)) == 200
    assert await status("inner:8080", f"{origin}:443", **proxied, trusted_proxies=("10.0.0.0/8",)) == 200
    assert await status("inner:8080", "http://inner:8080", **proxied, trusted_proxies=("10.0.0.0/8",)) == 403
    assert await status("inner:8080", origin, **proxied) == 403, "from anybody else it says nothing"


async def test_with_keys_any_host_and_origin_pass() -> None:
    assert await status("evil.org", "https://evil.org", api_keys=("k",)) == 200
    assert await status("box.lan", "null", api_keys=("k",)) == 200


async def test_any_host_passes_where_the_operator_opened_the_server_and_named_none() -> None:
    assert await status("box.lan", **OPEN) == 200
    assert await status("evil.org", **OPEN, allowed_hosts=("box.lan",)) == 403


@pytest.mark.parametrize("options", [{}, {"api_keys": ("k",)}, OPEN])
async def test_a_request_has_one_host(options: dict[str, Any]) -> None:
    """Over a real connection: clients of libraries never send anything else."""
    listener = socket.create_server(("127.0.0.1", 0))
    app: Any = guarded(Settings(Path(), Path(), **options))
    server = uvicorn.Server(uvicorn.Config(app, http=BoundedHttp, lifespan="off", log_config=None))
    serving = asyncio.create_task(server.serve([listener]))

    async def answer(version: str, *hosts: str) -> tuple[int, str]:
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        lines = [f"GET / HTTP/{version}", *(f"host: {host}" for host in hosts), "connection: close", "", ""]
        writer.write("\r\n".join(lines).encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        return int(head.split()[1]), json.loads(body)["error"]["message"] if body.startswith(b"{") else ""

    async with asyncio.timeout(60):
        assert (await answer("1.1", "localhost"))[0] == 200
        assert await answer("1.1", "localhost", "localhost") == (400, "The request has 2 Host headers; send one.")
        assert await answer("1.1", "localhost", "evil.org") == (400, "The request has 2 Host headers; send one.")
        assert await answer("1.0", "localhost", "evil.org") == (400, "The request has 2 Host headers; send one.")
        assert await answer("1.1") == (400, "The request has 0 Host headers; send one.")
        assert (await answer("1.0"))[0] == (403 if not options else 200), "HTTP/1.0 has no Host"
        server.should_exit = True
        await serving

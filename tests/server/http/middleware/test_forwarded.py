"""What a proxy says counts only where it is trusted, and only if it is a host or a path."""

from __future__ import annotations

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from server.http.middleware.forwarded import PREFIX, ForwardedMiddleware

SAID = {
    "x-forwarded-for": "203.0.113.9",
    "x-forwarded-proto": "https",
    "x-forwarded-host": "api.example.org:8443, inner",
    "x-forwarded-prefix": "/llm/castor/",
}


async def tell(scope: Scope, receive: Receive, send: Send) -> None:
    request = Request(scope)
    told = [request.client.host, request.url.scheme, request.headers["host"], getattr(request.state, PREFIX, "")]
    await JSONResponse(told)(scope, receive, send)


async def told(headers: dict[str, str], client: str = "10.0.0.7") -> list[str]:
    app = ForwardedMiddleware(tell, ("10.0.0.0/8",))
    transport = httpx.ASGITransport(app=app, client=(client, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://plain") as http:
        found: list[str] = (await http.get("/", headers=headers)).json()
    return found


async def test_a_trusted_proxy_is_believed() -> None:
    assert await told(SAID) == ["203.0.113.9", "https", "api.example.org:8443", "/llm/castor"]
    assert await told({}) == ["10.0.0.7", "http", "plain", ""]


async def test_anybody_else_is_not() -> None:
    assert await told(SAID, client="192.0.2.1") == ["192.0.2.1", "http", "plain", ""]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-forwarded-host", "a b"),
        ("x-forwarded-host", "evil/path"),
        ("x-forwarded-host", "user@host"),
        ("x-forwarded-host", ""),
        ("x-forwarded-prefix", "no-slash"),
        ("x-forwarded-prefix", "//evil.example"),
        ("x-forwarded-prefix", "/a?b"),
        ("x-forwarded-prefix", "/"),
    ],
)
async def test_what_is_no_host_or_path_is_absent(name: str, value: str) -> None:
    assert await told({name: value}) == ["10.0.0.7", "http", "plain", ""]

"""Behind a proxy that is trusted: the client's address, the scheme, the host and the prefix that the client used."""

from __future__ import annotations

import re
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

PREFIX = "forwarded_prefix"
"""In the request's state: the path under which the proxy shows this server, without a slash at the end."""

HOST = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::\d{1,5})?")
_PREFIX = re.compile(r"(?:/[A-Za-z0-9._~-]{1,64}){1,8}")


class ForwardedMiddleware:
    """Reads ``X-Forwarded-For``, ``-Proto``, ``-Host`` and ``-Prefix`` where they come from a trusted address; from any
    other they are ignored. A value that is no host or no path counts as absent."""

    def __init__(self, app: ASGIApp, trusted_proxies: tuple[str, ...]) -> None:
        any_app: Any = app
        self._app = ProxyHeadersMiddleware(any_app, trusted_hosts=list(trusted_proxies))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # This comes first: uvicorn's middleware replaces the proxy's address, which decides whether to trust.
        if scope["type"] == "http" and scope["client"] and scope["client"][0] in self._app.trusted_hosts:
            host, prefix = (_first(scope, name) for name in (b"x-forwarded-host", b"x-forwarded-prefix"))
            if HOST.fullmatch(host):
                others = [(name, value) for name, value in scope["headers"] if name != b"host"]
                scope["headers"] = [(b"host", host.encode()), *others]
            if _PREFIX.fullmatch(prefix.rstrip("/")):
                scope.setdefault("state", {})[PREFIX] = prefix.rstrip("/")
        any_scope: Any = scope
        any_receive: Any = receive
        any_send: Any = send
        await self._app(any_scope, any_receive, any_send)


def _first(scope: Scope, wanted: bytes) -> str:
    """What the proxy nearest to the client wrote."""
    values = [value for name, value in scope["headers"] if name == wanted]
    return values[0].decode("latin-1").split(",")[0].strip() if values else ""

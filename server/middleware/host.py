"""Keeps web pages away from a server without keys.

A page in the user's browser can reach a loopback port, directly (then its ``Origin`` is foreign) or by letting its own
name resolve to 127.0.0.1 (DNS rebinding; then the ``Host`` is foreign). Programs on this machine send neither.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import PermissionDenied
from server.middleware import refuse
from server.settings import Settings, is_loopback


class HostMiddleware:
    """Refuses a ``Host`` or ``Origin`` that is neither of the loopback nor allowed by the settings.

    It rests where there are keys (a page does not know them) and where the server is open to other machines by choice
    and no host is named.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._active = not settings.api_keys and (settings.on_loopback or bool(settings.allowed_hosts))
        self._hosts = frozenset(host.lower() for host in (*settings.allowed_hosts, settings.host))
        self._origins = frozenset(settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._active and scope["type"] == "http":
            request = Request(scope)
            refusal = self._refusal(request)
            if refusal is not None:
                await refuse(request, refusal, "host", receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> PermissionDenied | None:
        host = request.headers.get("host", "")
        if not self._is_ours(f"//{host}"):
            return PermissionDenied(
                f"The Host header names {host[:100]!r}, which is not a name of this machine. "
                "If it should reach this server, add it to --allowed-host (CASTOR_ALLOWED_HOSTS)."
            )
        origin = request.headers.get("origin")
        if origin is None or origin in self._origins or "*" in self._origins or self._is_ours(origin):
            return None
        return PermissionDenied(
            f"The Origin header names {origin[:100]!r}: web pages from there may not use this server. "
            "To allow it, add it to --cors-origin (CASTOR_CORS_ORIGINS)."
        )

    def _is_ours(self, url: str) -> bool:
        try:
            host = urlsplit(url).hostname or ""
        except ValueError:
            return False
        return is_loopback(host) or host in self._hosts

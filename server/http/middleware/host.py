"""Refuses requests without exactly one Host, and requests of web pages on a server without keys.

A page in the user's browser can reach a port of this machine or of its network, directly (then its ``Origin`` is
foreign) or by letting its own name resolve to 127.0.0.1 (DNS rebinding; then the ``Host`` is foreign). Programs send no
``Origin``.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.config.settings import Settings, is_loopback
from server.errors import ApiError, InvalidArgument, PermissionDenied
from server.http.middleware import refuse
from server.http.middleware.forwarded import HOST

_DEFAULT_PORTS = {"http": 80, "https": 443}


class HostMiddleware:
    """Refuses what has no ``Host`` or several; where there are no keys, also an ``Origin`` that is neither the server's
    own nor allowed by the settings, and a ``Host`` that is neither of the loopback nor allowed.

    Where there are keys, a page does not know them. Any host name is accepted where the server is deliberately open to
    other machines and the settings name no host.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._checks_origin = not settings.api_keys
        self._checks_host = self._checks_origin and (settings.on_loopback or bool(settings.allowed_hosts))
        self._hosts = frozenset(host.lower() for host in (*settings.allowed_hosts, settings.host))
        self._origins = frozenset(settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            refusal = self._refusal(request)
            if refusal is not None:
                await refuse(request, refusal, "host", receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> ApiError | None:
        hosts = request.headers.getlist("host")
        if len(hosts) > 1 or (not hosts and request.scope["http_version"] != "1.0"):
            return InvalidArgument(f"The request has {len(hosts)} Host headers; send one.")
        host = hosts[0] if hosts else ""
        if self._checks_host and not self._is_ours(host):
            return PermissionDenied(
                f"The Host header names {host[:100]!r}, which is not a name of this machine. "
                "If it should reach this server, add it to --allowed-host (CASTOR_ALLOWED_HOSTS)."
            )
        origins = request.headers.getlist("origin")
        if not origins or not self._checks_origin or "*" in self._origins:
            return None
        own = _place(f"{request.scope['scheme']}://{host}")
        for origin in origins:
            if origin not in self._origins and (own is None or _place(origin) != own):
                return PermissionDenied(
                    f"The Origin header names {origin[:100]!r}: web pages from there may not use this server. "
                    "To allow it, add it to --cors-origin (CASTOR_CORS_ORIGINS); if it is the server's own address "
                    "behind a proxy, add the proxy to --trusted-proxy (CASTOR_TRUSTED_PROXIES)."
                )
        return None

    def _is_ours(self, host: str) -> bool:
        if not HOST.fullmatch(host):
            return False
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return is_loopback(name) or name in self._hosts


def _place(origin: str) -> tuple[str, str, int] | None:
    """Scheme, host and port of an origin; None if it is not one, such as ``null``."""
    try:
        url = urlsplit(origin)
        port = _DEFAULT_PORTS[url.scheme] if url.port is None else url.port
    except (ValueError, KeyError):
        return None
    is_plain = HOST.fullmatch(url.netloc) and not (url.path or url.query or url.fragment)
    return (url.scheme, url.hostname, port) if url.hostname and is_plain else None

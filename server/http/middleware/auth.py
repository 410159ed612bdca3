"""API keys: a request that carries one of them may pass, and its identity is derived from the key."""

from __future__ import annotations

import hashlib
import hmac

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError, ApiKeyInvalid, PermissionDenied
from server.http.middleware import refuse
from server.http.query import KEYS, pairs
from server.storage.files.upload_url import upload_id_of

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
"""Probes need no key; one that they send anyway still identifies them. ``/metrics`` is not among them: Prometheus can
send ``Authorization: Bearer``."""


class AuthMiddleware:
    """Accepts ``x-goog-api-key``, ``?key=``, ``?access_token=`` and ``Authorization: Bearer`` alike; one that is right
    is enough. Without keys every request passes."""

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests or upload_id_of(scope):
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        try:
            scope["state"]["identity"] = request.state.record.identity = self._identify(request)
        except ApiError as refusal:
            if scope["path"] not in OPEN_PATHS:
                await refuse(request, refusal, "api_key", receive, send)
                return
        await self._app(scope, receive, send)

    def _identify(self, request: Request) -> str:
        """The identity of the caller: a stable hash of the key. Raises ``ApiError``."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        keys = [request.headers.get("x-goog-api-key", "")]
        # Latin-1 gives back the bytes that were sent, whatever they were.
        keys += [value for name, value in pairs(request.scope, "latin-1") if name in KEYS]
        keys += [token] if scheme.lower() == "bearer" else []
        sent = [key.strip().encode("latin-1") for key in keys if key.strip()]  # an empty one counts as none
        if not sent:
            raise PermissionDenied(
                "Method doesn't allow unregistered callers (callers without established identity). "
                "Please use an API key: send it as the header x-goog-api-key."
            )
        for digest in map(_digest, sent):
            # Every known key is compared, so that the time taken does not reveal which one came close.
            if any([hmac.compare_digest(digest, known) for known in self._digests]):  # noqa: C419
                return hashlib.blake2b(digest, digest_size=16, person=b"castor-identity").hexdigest()
        raise ApiKeyInvalid()


def _digest(key: bytes) -> bytes:
    """Keys are compared by hash: equal lengths, whatever was sent."""
    return hashlib.sha256(key).digest()

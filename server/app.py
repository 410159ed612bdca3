"""Builds the ASGI application: routes, middleware, and what starts and stops with the server."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from engine.api.errors import EngineError
from server.config.settings import Settings
from server.errors import ApiError
from server.http.error_response import api_error_response, http_error
from server.http.middleware.auth import AuthMiddleware
from server.http.middleware.cors import CorsMiddleware
from server.http.middleware.forwarded import ForwardedMiddleware
from server.http.middleware.host import HostMiddleware
from server.http.middleware.path import PathMiddleware
from server.http.middleware.record import RecordMiddleware
from server.models.registry import Registry
from server.observability.logs import log
from server.routes import all_routes
from server.services import build_services
from server.storage.files.store import FileStore

SWEEP_SECONDS = 60.0
EXPOSED_HEADERS = [
    *("X-Goog-Upload-URL", "X-Goog-Upload-Control-URL", "X-Goog-Upload-Chunk-Granularity", "X-Goog-Upload-Status"),
    *("X-Goog-Upload-Size-Received", "X-Castor-Ignored", "X-Request-Id", "Retry-After", "Allow"),
]
"""The response headers that scripts of allowed origins may read."""


def create_app(settings: Settings, registry: Registry) -> Starlette:
    """The ASGI application; its lifespan loads the registry's models and unloads them. ``app.state.services`` holds its
    `Services`. Raises ``ConfigError`` where the data folder cannot be used.
    """
    services = build_services(settings, registry)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        registry.start()
        sweeping = asyncio.create_task(_sweep_files(services.files))
        try:
            yield
        finally:
            sweeping.cancel()
            await services.close()

    cors = Middleware(
        CorsMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        allow_private_network=True,
        expose_headers=EXPOSED_HEADERS,
        max_age=600,
    )
    # Outermost first. All below the paths read them in their normal form. Preflights carry no key, so CORS answers them
    # before keys are checked.
    layers = [
        *([Middleware(ForwardedMiddleware, settings.trusted_proxies)] if settings.trusted_proxies else []),
        Middleware(PathMiddleware),
        Middleware(RecordMiddleware, services.metrics, settings.api_keys),
        *([cors] if settings.cors_origins else []),
        Middleware(HostMiddleware, settings),
        Middleware(AuthMiddleware, settings.api_keys),
    ]
    app = Starlette(
        routes=all_routes(),
        middleware=layers,
        exception_handlers={ApiError: _failed, EngineError: _failed, HTTPException: _failed},
        lifespan=lifespan,
    )
    # A redirect to a path with or without a slash would be built from the client's own Host header.
    app.router.redirect_slashes = False
    app.state.services = services
    return app


async def _sweep_files(files: FileStore) -> None:
    """Remove expired files: at once, since an earlier server may have left some, then every ``SWEEP_SECONDS``."""
    while True:
        try:
            await asyncio.to_thread(files.sweep)
        except (OSError, sqlite3.Error) as error:
            log.error("expired files could not be removed", exc_info=error)
        await asyncio.sleep(SWEEP_SECONDS)


async def _failed(request: Request, failure: Exception) -> Response:
    error = http_error(failure)
    request.state.record.failed(error)
    return api_error_response(request, error)

"""Builds the application: routes, layers of middleware, and what begins and ends with the server."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount

from engine.api.errors import EngineError
from server.config.errors import ConfigError
from server.config.settings import Settings
from server.errors import ApiError, api_error_response
from server.grammar.compiler import GrammarCompiler
from server.http.middleware.auth import AuthMiddleware
from server.http.middleware.forwarded import ForwardedMiddleware
from server.http.middleware.host import HostMiddleware
from server.http.middleware.record import RecordMiddleware
from server.mapper.thought_signature import signature_key
from server.media.documents import DocumentReader
from server.models.registry import Registry
from server.observability.logs import log
from server.observability.metrics import Metrics
from server.offload.fair import FairSlots
from server.routes import api_routes
from server.routes.ops import ops_routes
from server.storage.files.store import FileLimits, FileStore
from server.storage.files.upload import Uploads
from server.version import castor_version

SWEEP_SECONDS = 60.0
EXPOSED_HEADERS = ["X-Goog-Upload-URL", "X-Goog-Upload-Status", "X-Goog-Upload-Size-Received", "X-Castor-Ignored"]
"""What scripts of allowed origins may read of an answer."""


def create_app(settings: Settings, registry: Registry) -> Starlette:
    """The ASGI application; its lifespan loads the registry's models and unloads them.

    ``app.state`` holds ``settings``, ``registry``, ``metrics``, ``files``, ``uploads``, ``documents``, ``grammars``,
    ``large_requests``, ``signature_key`` and ``draining``, which the server sets when it ends. Raises ``ConfigError``
    where the folder of data cannot be used.
    """
    metrics = Metrics(registry.entries, castor_version())
    app = Starlette(
        routes=[*ops_routes(), Mount("/genai", routes=api_routes()), Mount("", routes=api_routes())],
        middleware=_layers(settings, metrics),
        exception_handlers={ApiError: _failed, EngineError: _failed, HTTPException: _failed},
        lifespan=_lifespan,
    )
    # A redirect to a path with or without a slash would be built from the client's own Host header.
    app.router.redirect_slashes = False
    app.state.settings = settings
    app.state.registry = registry
    app.state.metrics = metrics
    app.state.signature_key = signature_key(settings.data_dir)
    app.state.files = _open_files(settings)
    app.state.uploads = Uploads(app.state.files)
    app.state.documents = DocumentReader(app.state.files)
    app.state.grammars = GrammarCompiler()
    app.state.large_requests = FairSlots(1, "Too many long requests are being read. Please try again later.")
    app.state.draining = False
    return app


def _layers(settings: Settings, metrics: Metrics) -> list[Middleware]:
    """Outermost first. Preflights carry no key, so they are answered before keys are asked for."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=EXPOSED_HEADERS,
        max_age=600,
    )
    forwarded = Middleware(ForwardedMiddleware, settings.trusted_proxies)
    return [
        *([forwarded] if settings.trusted_proxies else []),
        Middleware(RecordMiddleware, metrics, settings.api_keys),
        *([cors] if settings.cors_origins else []),
        Middleware(HostMiddleware, settings),
        Middleware(AuthMiddleware, settings.api_keys),
    ]


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    app.state.registry.start()
    sweeping = asyncio.create_task(_sweep_files(app.state.files))
    try:
        yield
    finally:
        sweeping.cancel()
        await app.state.registry.close()
        await app.state.grammars.close()
        app.state.files.close()


def _open_files(settings: Settings) -> FileStore:
    limits = FileLimits(
        file_bytes=settings.max_file_bytes,
        owner_bytes=settings.max_key_file_bytes,
        total_bytes=settings.max_total_file_bytes,
        lifetime=settings.file_hours * 3600,
    )
    folder = settings.data_dir / "files"
    try:
        return FileStore(folder, limits)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"the folder of uploaded files {folder} cannot be used: {error}") from None


async def _sweep_files(files: FileStore) -> None:
    """Now, for what an earlier server left behind, and then again and again."""
    while True:
        try:
            await asyncio.to_thread(files.sweep)
        except (OSError, sqlite3.Error) as error:
            log.error("expired files could not be removed", exc_info=error)
        await asyncio.sleep(SWEEP_SECONDS)


async def _failed(request: Request, failure: Exception) -> Response:
    request.state.record.failed(failure)
    return api_error_response(request, failure)

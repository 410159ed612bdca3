"""Builds the application: routes, layers of middleware, and what begins and ends with the server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount

from engine.types import EngineError
from server.errors import ApiError, api_error_response
from server.mapper.signature import signature_key
from server.middleware.auth import AuthMiddleware
from server.middleware.host import HostMiddleware
from server.middleware.record import RecordMiddleware
from server.observe import Metrics
from server.registry import Registry
from server.routes import api_routes
from server.routes.ops import ops_routes
from server.settings import Settings
from server.version import castor_version


def create_app(settings: Settings, registry: Registry) -> Starlette:
    """The ASGI application; its lifespan loads the registry's models and unloads them.

    ``app.state`` holds ``settings``, ``registry``, ``metrics``, ``signature_key`` and ``draining``, which the server
    sets when it ends. Raises ``ConfigError`` where the key of signatures can be neither read nor made.
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
    app.state.draining = False
    return app


def _layers(settings: Settings, metrics: Metrics) -> list[Middleware]:
    """Outermost first. Preflights carry no key, so they are answered before keys are asked for."""
    cors = Middleware(
        CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"], max_age=600
    )
    return [
        Middleware(RecordMiddleware, metrics),
        *([cors] if settings.cors_origins else []),
        Middleware(HostMiddleware, settings),
        Middleware(AuthMiddleware, settings.api_keys),
    ]


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    app.state.registry.start()
    try:
        yield
    finally:
        await app.state.registry.close()


async def _failed(request: Request, failure: Exception) -> Response:
    request.state.record.failed(failure)
    return api_error_response(request, failure)

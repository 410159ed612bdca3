"""The routes of operators: liveness, readiness, metrics."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from engine.api.engine import EngineState
from server.services import services_of
from server.version import castor_version


async def healthz(_: Request) -> Response:
    """200 as long as the process answers at all."""
    return JSONResponse({"status": "ok", "version": castor_version()})


async def readyz(request: Request) -> Response:
    """200 once every model marked ``load: start`` can answer; until then, and while draining, 503 with the reasons.

    Where there are API keys, only callers with one see the models. A call also retries models that failed to load: a
    load balancer sends no requests before the answer is 200.
    """
    services = services_of(request)
    registry, draining = services.registry, services.draining.is_set()
    if not draining:
        registry.start()
    ready = all(entry.health().state is EngineState.READY for entry in registry.required())
    status = "draining" if draining else "ready" if ready else "loading"
    body: dict[str, Any] = {"status": status}
    if request.state.identity or not services.settings.api_keys:
        healths = [(entry, entry.health()) for entry in registry.entries()]
        body["models"] = {
            entry.name: {
                "state": str(health.state),
                "detail": health.detail,
                "progress": round(health.progress, 3),
                "load": entry.spec.load,
            }
            for entry, health in healths
        }
    return JSONResponse(body, 200 if status == "ready" else 503)


async def metrics(request: Request) -> Response:
    """Everything for Prometheus. Where there are API keys, this needs one: scrapers can send a Bearer token."""
    return Response(services_of(request).metrics.exposition(), media_type="text/plain; version=0.0.4")

"""All routes: those of operators (``all_routes``), and the API's as a table of HTTP method, path, method and answer.

The version is an opaque first segment and may be missing. Names of models may hold ``/`` and ``:``; the method comes
after the last colon. ``models/`` in front of a name is optional (wire reference, section 1.2).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette import routing
from starlette.requests import Request
from starlette.responses import Response

from server.errors import MethodNotAllowed
from server.routes.files import delete_file, download_file, get_file, list_files
from server.routes.generate import generate_content, stream_generate_content
from server.routes.models import get_model, list_models
from server.routes.ops import healthz, metrics, readyz
from server.routes.tokens import count_tokens
from server.routes.unserved import (
    collection_unserved,
    create_file,
    method_unserved,
    no_such_method,
    nothing_here,
    register_files,
)
from server.routes.uploads import upload_file
from server.services import services_of

HTTP_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
UNSERVED_METHODS = (
    "embedContent|batchEmbedContents|asyncBatchEmbedContent|batchGenerateContent|predict|predictLongRunning|"
    "generateAnswer|embedText|batchEmbedText|countTextTokens|countMessageTokens|generateMessage|generateText"
)
UNSERVED_COLLECTIONS = (
    "agents|auth_tokens|batches|cachedContents|corpora|credentials|decisions|dynamic|environments|"
    "fileSearchStores|generatedFiles|interactions|operations|triggers|tunedModels|voices|webhooks"
)
_ANY = "any"
_V = r"(?:v\d\w*/)?"
_VERSION = r"(?:(?P<version>v\d\w*)/)?"
"""The same for answers that contain file addresses, which use the version of the request."""
_DEFAULT_VERSION = "v1beta"
_MODEL = rf"{_V}(?P<model>.*)"
_FILE = rf"(?:download/)?{_VERSION}files/(?:https?://[^?#]*/files/)?(?P<file_id>[^/:]+)"
"""google-genai puts a whole uri after ``files/`` to get the file with that uri."""


@dataclass(frozen=True, slots=True)
class Route:
    """One row: ``path`` is a pattern of the whole path below the prefix, without slashes at its ends.

    ``answer`` gets the request, the services and the named groups; in place of ``model`` it gets the ``entry``.
    ``method`` is its name in the API, logs and metrics; "" marks refusals of what is not served.
    """

    http: str
    path: str
    method: str
    answer: Callable[..., Awaitable[Response]]


ROUTES = (
    Route("POST", rf"{_V}upload/{_VERSION}files", "uploadFile", upload_file),
    Route("PUT", rf"{_V}upload/{_VERSION}files", "uploadFile", upload_file),
    Route("GET", rf"{_FILE}:download", "downloadFile", download_file),
    Route("GET", _FILE, "getFile", get_file),
    Route("DELETE", _FILE, "deleteFile", delete_file),
    Route("GET", rf"{_VERSION}files", "listFiles", list_files),
    Route("POST", rf"{_VERSION}files", "", create_file),
    Route("GET", rf"{_V}models", "listModels", list_models),
    Route("POST", rf"{_MODEL}:generateContent", "generateContent", generate_content),
    Route("POST", rf"{_MODEL}:streamGenerateContent", "streamGenerateContent", stream_generate_content),
    Route("POST", rf"{_MODEL}:countTokens", "countTokens", count_tokens),
    Route(_ANY, rf"{_V}files:register", "", register_files),
    Route("POST", rf"{_V}(?P<collection>[^/:]*)(?:[/:].*)?:(?P<method>{UNSERVED_METHODS})", "", method_unserved),
    Route(_ANY, rf"{_V}(?P<collection>{UNSERVED_COLLECTIONS})(?:[/:].*)?", "", collection_unserved),
    Route("POST", rf"{_V}models/.*:.*", "", no_such_method),
    Route("GET", rf"{_V}(?P<model>models/.*)", "getModel", get_model),
)
"""The first matching path decides. A refusal applies to its HTTP method only: with another, a later path may match."""
MODEL_METHODS = tuple(route.method for route in ROUTES if route.path.startswith(_MODEL))
"""What a model is asked to do: POST models/{model}:{method}."""
_BY_PATH = [
    (re.compile(path, re.DOTALL | re.ASCII), {route.http: route for route in ROUTES if route.path == path})
    for path in dict.fromkeys(route.path for route in ROUTES)
]


def all_routes() -> list[routing.BaseRoute]:
    """The paths of operators, and the API under both of its prefixes; unknown paths there get the error envelope
    too."""
    api = [routing.Route("/{path:path}", dispatch, methods=HTTP_METHODS)]
    return [
        routing.Route("/healthz", healthz),
        routing.Route("/readyz", readyz),
        routing.Route("/metrics", metrics),
        routing.Mount("/genai", routes=api),
        routing.Mount("", routes=api),
    ]


async def dispatch(request: Request) -> Response:
    """Answer one call of the API. Raises ``ApiError``."""
    path = request.path_params["path"].strip("/")
    for pattern, routes in _BY_PATH:
        found = pattern.fullmatch(path)
        if found is None:
            continue
        route = routes.get(request.method) or routes.get(_ANY)
        if route is not None:
            arguments: dict[str, Any] = found.groupdict()
            services, model = services_of(request), ""
            if "version" in arguments:
                arguments["version"] = arguments["version"] or _DEFAULT_VERSION
            if "model" in arguments:
                arguments["entry"] = services.registry.resolve(arguments.pop("model").removeprefix("models/"))
                model = arguments["entry"].name
            if route.method:
                request.state.record.resolved(model, route.method)
            return await route.answer(request, services, **arguments)
        allowed = [route.http for route in routes.values() if route.method]
        if allowed:
            raise MethodNotAllowed(
                f"{request.method} is not allowed for {request.url.path[:200]}; use {' or '.join(allowed)}",
                headers={"Allow": ", ".join(allowed)},
            )
    raise nothing_here(request)

"""All routes: those of operators (``all_routes``), and the API's as a table of HTTP method, path, method and answer.

Paths come in their normal form (`server.http.middleware.path`). Names of models may hold ``/`` and ``:``; the method
comes after the last colon. ``models/`` in front of a name is optional (wire reference, section 1.2).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette import routing
from starlette.requests import Request
from starlette.responses import Response

from server.errors import MethodNotAllowed, ModelNotFound
from server.http.field_mask import EVERYTHING, FieldMask
from server.http.middleware.path import PLAIN_PATH, UNSERVED_COLLECTIONS
from server.http.query import read_query
from server.models.registry import Entry, Registry
from server.routes.files import delete_file, download_file, get_file, list_files
from server.routes.generate import generate_content, stream_generate_content
from server.routes.models import get_model, list_models
from server.routes.ops import healthz, metrics, readyz
from server.routes.tokens import count_tokens
from server.routes.unserved import (
    collection_unserved,
    create_file,
    live_unserved,
    method_unserved,
    no_such_method,
    nothing_here,
    openai_unserved,
    register_files,
)
from server.routes.uploads import upload_file
from server.services import services_of
from server.wire import answers
from server.wire.answers import Fields

HTTP_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
UNSERVED_METHODS = (
    "embedContent|batchEmbedContents|asyncBatchEmbedContent|batchGenerateContent|predict|predictLongRunning|"
    "generateAnswer|embedText|batchEmbedText|countTextTokens|countMessageTokens|generateMessage|generateText"
)
_ANY = "any"
_V = r"v\d\w*/"
_VERSION = r"(?P<version>v\d\w*)/"
"""The same for answers that contain file addresses, which use the version of the request."""
_MODEL = rf"{_V}(?P<model>.*)"
_FILE = rf"{_VERSION}files/(?P<file_id>[^/:]+)"
_OPENAI = (
    rf"{_V}(?:openai|endpoints/openapi)(?:/.*)?|"
    rf"(?:{_V})?(?:chat/completions|completions|responses|embeddings|moderations|(?:images|audio)/\w+)"
)
"""The base path that Google's own OpenAI layer has, that of Vertex AI, and what OpenAI clients ask for below a base URL
that is only a host."""
_PAGES = ("pageSize", "pageToken")
_UPLOAD = ("upload_id", "uploadType", "upload_protocol")


@dataclass(frozen=True, slots=True)
class Route:
    """One row: ``path`` is a pattern of the whole path, without slashes at its ends.

    ``answer`` gets the request, the services and the named groups; in place of ``model`` it gets the ``entry``.
    ``method`` is its name in the API, logs and metrics; "" marks refusals of what is not served. ``fields`` are those
    of its answers, None where they are not JSON; ``query`` names its parameters beside Google's standard ones, and
    ``alts`` are the values of ``alt`` that it has an answer for.
    """

    http: str
    path: str
    method: str
    answer: Callable[..., Awaitable[Response]]
    fields: Fields | None = None
    query: tuple[str, ...] = ()
    alts: tuple[str, ...] = ("json",)


def _of_model(method: str, answer: Callable[..., Awaitable[Response]], fields: Fields, *alts: str) -> Route:
    return Route("POST", f"{_MODEL}:{method}", method, answer, fields, alts=alts or ("json",))


ROUTES = (
    Route("POST", rf"upload/{_VERSION}files", "uploadFile", upload_file, answers.CREATE_FILE, _UPLOAD),
    Route("PUT", rf"upload/{_VERSION}files", "uploadFile", upload_file, answers.CREATE_FILE, _UPLOAD),
    Route("GET", rf"{_FILE}:download", "downloadFile", download_file, alts=("media",)),
    Route("GET", _FILE, "getFile", get_file, answers.FILE),
    Route("DELETE", _FILE, "deleteFile", delete_file, answers.EMPTY),
    Route("GET", rf"{_VERSION}files", "listFiles", list_files, answers.LIST_FILES, _PAGES),
    Route("POST", rf"{_VERSION}files", "", create_file),
    Route("GET", rf"{_V}models", "listModels", list_models, answers.LIST_MODELS, _PAGES),
    Route(_ANY, _OPENAI, "", openai_unserved),
    Route(_ANY, r"ws/.*", "", live_unserved),
    _of_model("generateContent", generate_content, answers.GENERATE_CONTENT, "json", "sse"),
    _of_model("streamGenerateContent", stream_generate_content, answers.GENERATE_CONTENT, "json", "sse"),
    _of_model("countTokens", count_tokens, answers.COUNT_TOKENS),
    Route(_ANY, rf"{_V}files:register", "", register_files),
    Route("POST", rf"{_V}(?P<collection>[^/:]*)(?:[/:].*)?:(?P<method>{UNSERVED_METHODS})", "", method_unserved),
    Route(_ANY, rf"{_V}(?P<collection>{UNSERVED_COLLECTIONS})(?:[/:].*)?", "", collection_unserved),
    Route("POST", rf"{_V}models/.*:.*", "", no_such_method),
    Route("GET", rf"{_V}(?P<model>models/.*)", "getModel", get_model, answers.MODEL),
)
"""The first matching path decides. A refusal applies to its HTTP method only: with another, a later path may match."""
MODEL_METHODS = tuple(route.method for route in ROUTES if route.path.startswith(_MODEL))
"""What a model is asked to do: POST models/{model}:{method}."""
_BY_PATH = [
    (re.compile(path, re.DOTALL | re.ASCII), {route.http: route for route in ROUTES if route.path == path})
    for path in dict.fromkeys(route.path for route in ROUTES)
]


def all_routes() -> list[routing.BaseRoute]:
    """The paths of operators, and the API's below the root; unknown paths there get the error envelope too."""
    return [
        routing.Route("/healthz", healthz),
        routing.Route("/readyz", readyz),
        routing.Route("/metrics", metrics),
        routing.Route("/{path:path}", dispatch, methods=HTTP_METHODS),
    ]


async def dispatch(request: Request) -> Response:
    """Answer one call of the API. Raises ``ApiError``."""
    path = request.path_params["path"]
    for pattern, routes in _BY_PATH:
        found = pattern.fullmatch(path)
        if found is None:
            continue
        route = routes.get(request.method) or routes.get(_ANY)
        if route is not None:
            arguments: dict[str, Any] = found.groupdict()
            services, model = services_of(request), ""
            if "model" in arguments:
                arguments["entry"] = _entry(request, services.registry, arguments.pop("model"))
                model = arguments["entry"].name
            if route.method:
                request.state.record.resolved(model, route.method)
                own = route.query if route.fields is None else (*route.query, "fields")
                request.state.query, ignored = read_query(request, route.method, own, route.alts)
                request.state.record.ignored += ignored
                fields = request.state.query.get("fields")
                request.state.mask = FieldMask(fields, route.fields) if fields else EVERYTHING
            return await route.answer(request, services, **arguments)
        allowed = [route.http for route in routes.values() if route.method]
        if allowed:
            raise MethodNotAllowed(
                f"{request.method} is not allowed for {request.scope['path'][:200]}; use {' or '.join(allowed)}",
                headers={"Allow": ", ".join(allowed)},
            )
    raise nothing_here(request)


def _entry(request: Request, registry: Registry, name: str) -> Entry:
    """The model of a path. A tuned model may be served under its bare name. A name that holds a version, such as
    ``org/v1/name``, was read as a prefix and a version where no ``models/`` stands before it. Raises ``ModelNotFound``.
    """
    names = [name.removeprefix("models/")]
    if not name.startswith("models/"):
        whole, _, _ = request.scope["state"][PLAIN_PATH].removeprefix("/").rpartition(":")
        names += [name.removeprefix("tunedModels/"), whole]
    unknown: list[ModelNotFound] = []
    for candidate in names:
        try:
            return registry.resolve(candidate)
        except ModelNotFound as failure:
            unknown.append(failure)
    raise unknown[0]

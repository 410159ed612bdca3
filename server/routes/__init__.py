"""Paths of the Gemini surface to the functions that answer them.

The version is an opaque first segment and may be missing. Names of models may hold ``/`` and ``:``; the method stands
behind the last colon. ``models/`` in front of a name is optional (wire reference, section 1.2).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from server.errors import MethodNotAllowed, NotFound, Unimplemented
from server.registry import Entry
from server.routes.generate import generate_content, stream_generate_content
from server.routes.models import get_model, list_models
from server.routes.reading import find_model
from server.routes.tokens import count_tokens

Method = Callable[[Request, Entry], Awaitable[Response]]

SERVED: dict[str, Method] = {
    "generateContent": generate_content,
    "streamGenerateContent": stream_generate_content,
    "countTokens": count_tokens,
}
UNSERVED_VERBS = re.compile(
    "embedContent|batchEmbedContents|asyncBatchEmbedContent|batchGenerateContent|predict|predictLongRunning|"
    "generateAnswer|embedText|batchEmbedText|countTextTokens|countMessageTokens|generateMessage|generateText"
)
UNSERVED_COLLECTIONS = re.compile(
    "agents|auth_tokens|batches|cachedContents|corpora|credentials|decisions|download|dynamic|environments|"
    "fileSearchStores|files|generatedFiles|interactions|operations|triggers|tunedModels|upload|voices|webhooks"
)
HTTP_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_PATH = re.compile(r"(?:(?P<version>v\d\w*)/)?(?P<rest>.*)", re.DOTALL)


def api_routes() -> list[BaseRoute]:
    """Everything under the API's prefix; what is not known there answers in the error envelope too."""
    return [Route("/{path:path}", dispatch, methods=HTTP_METHODS)]


async def dispatch(request: Request) -> Response:
    """Answer one call of the API. Raises ``ApiError``."""
    found = _PATH.fullmatch(request.path_params["path"].strip("/"))
    assert found is not None
    rest = found["rest"]
    if rest == "models":
        _require(request, "GET")
        request.state.record.resolved("", "listModels")
        return await list_models(request)
    name, colon, verb = rest.rpartition(":")
    if colon and verb in SERVED:
        _require(request, "POST")
        return await _on_model(request, name, verb, SERVED[verb])
    _refuse_unserved(request, rest, verb if colon else "")
    if rest.startswith("models/") and not (colon and request.method == "POST"):
        _require(request, "GET")
        return await _on_model(request, rest, "getModel", get_model)
    raise NotFound(f"The requested URL {request.url.path[:200]} was not found on this server.")


async def _on_model(request: Request, name: str, method: str, answer: Method) -> Response:
    entry = find_model(request, name)
    request.state.record.resolved(entry.name, method)
    return await answer(request, entry)


def _require(request: Request, method: str) -> None:
    if request.method != method:
        raise MethodNotAllowed(
            f"{request.method} is not allowed for {request.url.path[:200]}; use {method}", headers={"Allow": method}
        )


def _refuse_unserved(request: Request, rest: str, verb: str) -> None:
    """Methods of the Gemini API that this server does not offer are told from paths that nobody knows."""
    collection = rest.partition("/")[0].partition(":")[0]
    if UNSERVED_VERBS.fullmatch(verb) and request.method == "POST":
        raise Unimplemented(f"{collection}.{verb} is not served by this server.")
    if UNSERVED_COLLECTIONS.fullmatch(collection):
        raise Unimplemented(f"{request.method} {collection} is not served by this server.")

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
from server.models.registry import Entry
from server.routes.files import delete_file, download_file, get_file, list_files
from server.routes.generate import generate_content, stream_generate_content
from server.routes.models import get_model, list_models
from server.routes.reading import find_model
from server.routes.tokens import count_tokens
from server.routes.uploads import upload_file

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
    "agents|auth_tokens|batches|cachedContents|corpora|credentials|decisions|dynamic|environments|"
    "fileSearchStores|generatedFiles|interactions|operations|triggers|tunedModels|voices|webhooks"
)
HTTP_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
NO_BARE_FILES = "files are made by uploading them: POST upload/v1beta/files; nothing is registered from elsewhere"
_VERSION = "v1beta"
"""Of the addresses of files, where a request names none."""
_PATH = re.compile(r"(?:(?P<version>v\d\w*)/)?(?P<rest>.*)", re.DOTALL | re.ASCII)
_UPLOAD = re.compile(r"(?:v\d\w*/)?upload/(?:(?P<version>v\d\w*)/)?files", re.ASCII)
_FILE = re.compile(
    r"(?:download/)?(?:(?P<version>v\d\w*)/)?files/(?:https?://[^?#]*/files/)?(?P<id>[^/:]+)(?P<media>:download)?",
    re.ASCII,
)
"""google-genai puts a whole uri behind ``files/`` when it is asked for the file with that uri."""


def api_routes() -> list[BaseRoute]:
    """Everything under the API's prefix; what is not known there answers in the error envelope too."""
    return [Route("/{path:path}", dispatch, methods=HTTP_METHODS)]


async def dispatch(request: Request) -> Response:
    """Answer one call of the API. Raises ``ApiError``."""
    path = request.path_params["path"].strip("/")
    if upload := _UPLOAD.fullmatch(path):
        _require(request, "POST", "PUT")
        request.state.record.resolved("", "uploadFile")
        return await upload_file(request, upload["version"] or _VERSION)
    if file := _FILE.fullmatch(path):
        return await _on_file(request, file["version"] or _VERSION, file["id"], download=bool(file["media"]))
    found = _PATH.fullmatch(path)
    assert found is not None
    rest = found["rest"]
    if rest == "files":
        return await _on_files(request, found["version"] or _VERSION)
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


async def _on_files(request: Request, version: str) -> Response:
    if request.method == "POST":
        raise Unimplemented(f"POST files is not served: {NO_BARE_FILES}.")
    _require(request, "GET")
    request.state.record.resolved("", "listFiles")
    return await list_files(request, version)


async def _on_file(request: Request, version: str, file_id: str, *, download: bool) -> Response:
    if download:
        _require(request, "GET")
        request.state.record.resolved("", "downloadFile")
        return await download_file(request, version, file_id)
    _require(request, "GET", "DELETE")
    answer, method = (get_file, "getFile") if request.method == "GET" else (delete_file, "deleteFile")
    request.state.record.resolved("", method)
    return await answer(request, version, file_id)


async def _on_model(request: Request, name: str, method: str, answer: Method) -> Response:
    entry = find_model(request, name)
    request.state.record.resolved(entry.name, method)
    return await answer(request, entry)


def _require(request: Request, *methods: str) -> None:
    if request.method not in methods:
        raise MethodNotAllowed(
            f"{request.method} is not allowed for {request.url.path[:200]}; use {' or '.join(methods)}",
            headers={"Allow": ", ".join(methods)},
        )


def _refuse_unserved(request: Request, rest: str, verb: str) -> None:
    """Methods of the Gemini API that this server does not offer are told from paths that nobody knows."""
    collection = rest.partition("/")[0].partition(":")[0]
    if rest == "files:register":
        raise Unimplemented(f"files.register is not served: {NO_BARE_FILES}.")
    if UNSERVED_VERBS.fullmatch(verb) and request.method == "POST":
        raise Unimplemented(f"{collection}.{verb} is not served by this server.")
    if UNSERVED_COLLECTIONS.fullmatch(collection):
        raise Unimplemented(f"{request.method} {collection} is not served by this server.")

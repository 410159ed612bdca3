"""Refusals of what the Gemini API has and this server does not serve, as distinct from unknown paths."""

from __future__ import annotations

from typing import NoReturn

from starlette.requests import Request
from starlette.responses import Response

from server.errors import NotFound, Unimplemented
from server.http.json_body import json_response
from server.http.middleware.path import PLAIN_PATH
from server.services import Services

NO_BARE_FILES = "files are made by uploading them: POST upload/v1beta/files; nothing is registered from elsewhere"


def nothing_here(request: Request) -> NotFound:
    """The error of a path that matches no route."""
    read = request.scope["path"]
    sent = request.scope["state"][PLAIN_PATH]
    told = "" if sent == read else f" (read as {read[:200]})"
    return NotFound(
        f"The requested URL {sent[:200]}{told} was not found on this server. A base URL ends before the version: "
        "requests go to BASE/v1beta/models/MODEL:generateContent, and BASE/v1beta/models lists the models."
    )


async def no_such_method(request: Request, _: Services) -> NoReturn:
    """POST models/{model}:{method}, where the API has no such method"""
    raise nothing_here(request)


async def create_file(_request: Request, _: Services, version: str) -> NoReturn:  # noqa: ARG001 - as list_files
    """POST files"""
    raise Unimplemented(f"POST files is not served: {NO_BARE_FILES}.")


async def register_files(_request: Request, _: Services) -> NoReturn:
    """files:register"""
    raise Unimplemented(f"files.register is not served: {NO_BARE_FILES}.")


async def method_unserved(_request: Request, _: Services, collection: str, method: str) -> NoReturn:
    """POST {collection}/...:{method}"""
    raise Unimplemented(f"{collection}.{method} is not served by this server.")


async def collection_unserved(request: Request, _: Services, collection: str) -> NoReturn:
    """Any HTTP method on a collection"""
    raise Unimplemented(f"{request.method} {collection} is not served by this server.")


async def live_unserved(_request: Request, _: Services) -> NoReturn:
    """The websocket of the Live API, as an answer to its handshake"""
    raise Unimplemented(
        "The Live API (BidiGenerateContent over a websocket) is not served by this server; "
        "stream answers with POST v1beta/models/MODEL:streamGenerateContent."
    )


async def openai_unserved(request: Request, _: Services) -> Response:
    """What clients of OpenAI's API ask for, in the form of their errors

    They show ``error.message`` of an object; other than Google's own layer, which answers with a list, this is none.
    ``x-should-retry`` keeps them from trying again.
    """
    error = Unimplemented(
        f"{request.method} {request.scope['path'][:200]} belongs to OpenAI's API, which is not served by this server. "
        "It speaks the Gemini API: POST v1beta/models/MODEL:generateContent, with a Gemini client."
    )
    request.state.record.failed(error)
    told = {"message": error.message, "type": "not_implemented_error", "param": None, "code": "unimplemented"}
    answer = json_response({"error": told}, {"x-should-retry": "false"})
    answer.status_code = error.code
    return answer

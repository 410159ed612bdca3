"""Refusals of what the Gemini API has and this server does not serve, as distinct from unknown paths."""

from __future__ import annotations

from typing import NoReturn

from starlette.requests import Request

from server.errors import NotFound, Unimplemented
from server.services import Services

NO_BARE_FILES = "files are made by uploading them: POST upload/v1beta/files; nothing is registered from elsewhere"


def nothing_here(request: Request) -> NotFound:
    """The error of a path that matches no route."""
    return NotFound(f"The requested URL {request.url.path[:200]} was not found on this server.")


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

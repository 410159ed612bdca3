"""Failures as HTTP answers."""

from __future__ import annotations

import json

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from engine.api.errors import Overloaded
from server.errors import ModelNotFound
from server.http.error_response import api_error_response, http_error


@pytest.mark.parametrize(
    ("failure", "code", "status"),
    [
        (HTTPException(404), 404, "NOT_FOUND"),
        (HTTPException(405), 405, "UNIMPLEMENTED"),
        (HTTPException(418), 400, "INVALID_ARGUMENT"),
        (HTTPException(502), 500, "INTERNAL"),
        (ClientDisconnect(), 499, "CANCELLED"),
        (Overloaded(""), 429, "RESOURCE_EXHAUSTED"),
    ],
)
def test_what_the_http_library_raises_is_an_error_of_the_api(failure: Exception, code: int, status: str) -> None:
    error = http_error(failure)
    assert (error.code, error.status) == (code, status)
    assert error.message


@pytest.mark.parametrize(
    ("path", "query", "array"),
    [
        ("/v1/models/m:streamGenerateContent", b"", True),
        ("/v1/models/m:streamGenerateContent", b"alt=json", True),
        ("/v1/models/m:streamGenerateContent", b"alt=sse&key=x", False),
        ("/v1/models/m:generateContent", b"", False),
    ],
)
def test_the_error_of_a_json_array_is_its_only_item(path: str, query: bytes, array: bool) -> None:
    scope = {"type": "http", "path": path, "query_string": query, "headers": [], "server": ("h", 1), "scheme": "http"}
    body = json.loads(bytes(api_error_response(Request(scope), ModelNotFound("m")).body))
    assert isinstance(body, list) is array
    assert (body[0] if array else body)["error"]["code"] == 404

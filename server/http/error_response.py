"""Failures as HTTP answers."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import Response

from server.errors import (
    ApiError,
    Cancelled,
    Internal,
    InvalidArgument,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    as_api_error,
    error_json,
)
from server.http.query import alt_of


def http_error(failure: BaseException) -> ApiError:
    """Any failure as a client sees it, those of starlette among them."""
    match failure:
        case HTTPException(status_code=code, detail=detail, headers=headers):
            known = {404: NotFound, 405: MethodNotAllowed, 413: PayloadTooLarge}
            if code in known:
                return known[code](detail, headers=headers)
            return InvalidArgument(detail) if code < 500 else Internal(detail)
        case ClientDisconnect():
            return Cancelled("The client closed the connection.")
        case _:
            return as_api_error(failure)


def api_error_response(request: HTTPConnection, failure: BaseException) -> Response:
    """The HTTP answer to a failure before the first byte of a body.

    A call that asked for the JSON-array framing gets the error as the only item of an array (wire reference 2.2).
    """
    error = http_error(failure)
    text = error_json(error)
    if wants_array(request):
        text = f"[{text}]"
    return Response(text, error.code, headers=error.headers, media_type="application/json")


def wants_array(request: HTTPConnection) -> bool:
    """Whether the answer is to be a streamed JSON array: a streaming method without ``alt=sse``."""
    return request.scope["path"].endswith(":streamGenerateContent") and alt_of(request) != "sse"

"""Pure ASGI middleware: what happens to every request before a route sees it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import Receive, Send

from server.errors import ApiError
from server.http.error_response import api_error_response


async def refuse(request: Request, refusal: ApiError, reason: str, receive: Receive, send: Send) -> None:
    """Answer with ``refusal`` in place of the route; ``reason`` is its label among the rejected."""
    request.state.record.failed(refusal)
    request.state.record.rejection = reason
    await api_error_response(request, refusal)(request.scope, receive, send)

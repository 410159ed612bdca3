"""Web pages of allowed origins: preflights, and the headers with which browsers show them the answers."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response


class CorsMiddleware(CORSMiddleware):
    """starlette's, but a preflight that is refused allows nothing at all, a private network included."""

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code != 200:
            for name in [name for name in answer.headers if name.startswith("access-control-allow-")]:
                del answer.headers[name]
        return answer

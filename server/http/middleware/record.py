"""The outermost layer: gives each request its record and its id, and turns unexpected exceptions into a clean 500."""

from __future__ import annotations

import asyncio
import re

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import Cancelled, as_api_error
from server.http.error_response import api_error_response
from server.observability.logs import log
from server.observability.metrics import Metrics
from server.observability.request_record import Crowd, RequestRecord

MAX_PATH_CHARACTERS = 300
"""As much of a path as the log shows."""


class RecordMiddleware:
    """Puts ``record`` and an empty ``identity`` into the request's state; logs and counts when the answer has ended.

    The answer carries ``x-request-id``, under which the log has the trace of an unexpected exception.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, api_keys: tuple[str, ...] = ()) -> None:
        self._app = app
        self._metrics = metrics
        self._crowd = Crowd()
        self._keys = re.compile("|".join(map(re.escape, api_keys)) or "(?!)")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = scope.get("client")
        # A client that writes & for ? has its key in the path.
        path = self._keys.sub("…", scope["path"])[:MAX_PATH_CHARACTERS]
        record = RequestRecord(self._metrics, scope["method"], path, client[0] if client else "")
        scope.setdefault("state", {}).update(record=record, identity="")
        with self._metrics.in_progress.track_inprogress():
            try:
                await _Exchange(self._app, record, receive, send).run(scope)
            finally:
                record.close(self._crowd)


class _Exchange:
    """One request and its answer, watched from outside."""

    def __init__(self, app: ASGIApp, record: RequestRecord, receive: Receive, send: Send) -> None:
        self._app = app
        self._record = record
        self._receive = receive
        self._send = send
        self._started = False
        self._complete = False

    async def run(self, scope: Scope) -> None:
        try:
            await self._app(scope, self._receive, self.send)
        except ClientDisconnect:
            self._abandoned()
        except asyncio.CancelledError:
            self._abandoned()
            raise
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 - the last boundary; a Rust panic is no Exception
            log.error("unexpected exception", request=self._record.id, path=self._record.path, exc_info=error)
            failure = as_api_error(error)
            self._record.failed(failure)
            if not self._started:  # an answer that has begun is cut off: the server library does so when no more comes
                answer = api_error_response(Request(scope), failure)
                await answer(scope, self._receive, self.send)
        else:
            if not self._complete:
                self._abandoned()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            self._record.status = self._record.status or message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self._record.id.encode())]
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._complete = True

    def _abandoned(self) -> None:
        """The answer is incomplete; unless a failure says why, the client went away."""
        if not self._record.error:
            self._record.failed(Cancelled("The client closed the connection."))

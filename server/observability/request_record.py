"""The record of one request while it is served: the fields of its log line, and what the metrics count."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field
from typing import Protocol

from engine.api.events import CandidateFinished, Delta, Event, RequestError, RequestFinished
from server.errors import as_api_error
from server.observability.logs import log

LOGGED_FIELDS = 100
"""Without effect, of one request."""
OPERATORS_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
OVERLOADED = "overloaded"
CROWD_SECONDS = 1.0
_REJECTIONS = {413: "too_large", 429: OVERLOADED, 503: "unavailable"}


class RequestCounters(Protocol):
    """The metrics as a record sees them."""

    def count(self, record: RequestRecord) -> None: ...

    def token_gap(self, model: str, seconds: float) -> None: ...


class Crowd:
    """Those that busy models turn away: the log has a line for the first of them, and one a second that counts the
    others. A line for each would cost as much as to turn it away. Belongs to one event loop."""

    def __init__(self) -> None:
        self._counts: dict[str, int] | None = None

    def has(self, model: str) -> bool:
        """Count one that was turned away; whether it is among those that the next line counts."""
        if self._counts is None:
            self._counts = {}
            asyncio.get_running_loop().call_later(CROWD_SECONDS, self._say)
            return False
        self._counts[model] = self._counts.get(model, 0) + 1
        return True

    def _say(self) -> None:
        for model, count in (self._counts or {}).items():
            log.info("more requests turned away", model=model, rejection=OVERLOADED, count=count)
        self._counts = None


@dataclass(slots=True)
class RequestRecord:
    """The record of one request while it is served; closed once, when the last byte is sent or the client is gone.

    Times are ``time.monotonic()`` instants. It holds neither text of a prompt or an answer nor a key.
    """

    metrics: RequestCounters
    http_method: str
    path: str
    client: str
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    started: float = field(default_factory=time.monotonic)
    model: str = ""
    method: str = ""
    status: int = 0
    error: str = ""
    rejection: str = ""
    identity: str = ""
    ignored: list[str] = field(default_factory=list)
    time_to_first_token: float | None = None
    totals: RequestFinished | None = None
    _grew_at: dict[int, float] = field(default_factory=dict)

    def resolved(self, model: str, method: str) -> None:
        """The request is for this entry of the registry (its real name) and this method of the API."""
        self.model, self.method = model, method

    def observe(self, event: Event) -> None:
        """Record an engine event: first token, gaps between tokens, totals."""
        match event:
            case Delta(candidate=candidate, token_ids=token_ids) if token_ids:
                now = time.monotonic()
                if self.time_to_first_token is None:
                    self.time_to_first_token = now - self.started
                before = self._grew_at.get(candidate)
                self._grew_at[candidate] = now
                if before is not None:
                    self.metrics.token_gap(self.model, (now - before) / len(token_ids))
            case CandidateFinished(candidate=candidate):
                self._grew_at.pop(candidate, None)
            case RequestFinished():
                self.totals = event
                if event.error is not None:
                    self.failed(event.error)

    def failed(self, failure: BaseException | RequestError) -> None:
        """The request ends with this failure, whether or not its answer has begun."""
        error = as_api_error(failure)
        self.error, self.status = error.status, error.code

    @property
    def rejected_for(self) -> str:
        """Why the request was turned away before any work was done; "" if it was not."""
        turned_away = self.method and self.time_to_first_token is None
        return self.rejection or (_REJECTIONS.get(self.status, "") if turned_away else "")

    def close(self, crowd: Crowd) -> None:
        """Count the request and write its log line, at the debug level for probes, which come every few seconds."""
        self.metrics.count(self)
        if self.model and self.rejected_for == OVERLOADED and crowd.has(self.model):
            return
        say = log.debug if self.path in OPERATORS_PATHS else log.info
        say("request", **self.summary())

    def summary(self) -> dict[str, object]:
        """The fields of the log line; what does not apply is left out."""
        totals = self.totals
        values: dict[str, object | None] = {
            "request": self.id,
            "http_method": self.http_method,
            "path": self.path,
            "model": self.model or None,
            "method": self.method or None,
            "status": self.status,
            "error": self.error or None,
            "duration_s": round(time.monotonic() - self.started, 4),
            "ttft_s": None if self.time_to_first_token is None else round(self.time_to_first_token, 4),
            "prompt_tokens": totals and totals.prompt_tokens,
            "cached_tokens": totals and totals.cached_tokens,
            "generated_tokens": totals and totals.candidate_tokens,
            "client": self.client,
            "identity": self.identity[:8] or None,
            "ignored": self.ignored[:LOGGED_FIELDS] or None,
        }
        return {name: value for name, value in values.items() if value is not None}

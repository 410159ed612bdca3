"""What the operator sees of the traffic: one record per request, the metrics made from it, and the log.

Every label value is one of a few that the operator or this code chose. A stranger cannot make a new one: a model that
does not exist, a method that does not exist and an HTTP method of one's own invention all count under "".
"""

from __future__ import annotations

import logging
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine.api.engine import Health
from engine.api.events import CandidateFinished, Delta, Event, RequestError, RequestFinished
from server.errors import as_api_error
from server.wire.paths import field_path

MAX_IGNORED_FIELDS = 32
"""Distinct values of the ``field`` label; the names come from request bodies, so what goes beyond counts as "other"."""

OPERATORS_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)

log = structlog.stdlib.get_logger("castor")


class Served(Protocol):
    """A model as the metrics see it."""

    @property
    def name(self) -> str: ...

    def health(self) -> Health: ...


@dataclass(slots=True)
class RequestRecord:
    """What is known of one request while it lives; closed once, when the last byte is out or the client is gone.

    Times are ``time.monotonic()`` instants. It holds neither text of a prompt or an answer nor a key.
    """

    metrics: Metrics
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
        """Take note of an engine event: first token, gaps between tokens, totals."""
        match event:
            case Delta(candidate=candidate, token_ids=token_ids) if token_ids:
                self._tokens_arrived(candidate, len(token_ids))
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

    def close(self) -> None:
        """Count the request and write its log line, at the debug level for probes, which come every few seconds."""
        self.metrics.count(self)
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
            "ignored": self.ignored or None,
        }
        return {name: value for name, value in values.items() if value is not None}

    def _tokens_arrived(self, candidate: int, count: int) -> None:
        now = time.monotonic()
        if self.time_to_first_token is None:
            self.time_to_first_token = now - self.started
        before = self._grew_at.get(candidate)
        self._grew_at[candidate] = now
        if before is not None:
            self.metrics.between_tokens.labels(self.model).observe((now - before) / count)


class Metrics:
    """The counters and histograms of one server, in a registry of their own."""

    def __init__(self, models: Callable[[], Iterable[Served]], version: str) -> None:
        self._registry = registry = CollectorRegistry(auto_describe=False)
        self._ignored_fields: set[str] = set()
        call = ("method", "model")
        self.requests = Counter(
            "castor_requests", "Finished requests; 499: the client went away.", (*call, "code"), registry=registry
        )
        self.in_progress = Gauge("castor_requests_in_progress", "Requests that are being answered.", registry=registry)
        self.rejected = Counter(
            "castor_rejected", "Requests turned away before any work was done.", ("reason",), registry=registry
        )
        self.first_token = Histogram(
            "castor_time_to_first_token_seconds",
            "From the request's head to its first token.",
            ("model",),
            buckets=_LATENCY,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "castor_inter_token_seconds",
            "Between two tokens of a candidate.",
            ("model",),
            buckets=_BETWEEN,
            registry=registry,
        )
        self.duration = Histogram(
            "castor_request_seconds",
            "From the request's head to the end of its answer.",
            call,
            buckets=_LATENCY,
            registry=registry,
        )
        self.prompt_tokens = Counter("castor_prompt_tokens", "Prompt tokens.", ("model",), registry=registry)
        self.cached_tokens = Counter(
            "castor_cached_tokens", "Prompt tokens read from the prefix cache.", ("model",), registry=registry
        )
        self.generated_tokens = Counter("castor_generated_tokens", "Sampled tokens.", ("model",), registry=registry)
        self.ignored_fields = Counter(
            "castor_ignored_fields", "Fields accepted without effect.", ("field",), registry=registry
        )
        Gauge("castor_build_info", "Which Castor this is.", ("version",), registry=registry).labels(version).set(1)
        registry.register(_EngineCollector(models))

    def count(self, record: RequestRecord) -> None:
        """Add a finished request."""
        self.requests.labels(record.method, record.model, str(record.status)).inc()
        turned_away = record.method and record.time_to_first_token is None
        reason = record.rejection or (_REJECTIONS.get(record.status, "") if turned_away else "")
        if reason:
            self.rejected.labels(reason).inc()
        for name in {field_path(path): None for path in record.ignored}:
            self.ignored_fields.labels(self._bounded(name)).inc()
        if record.method:
            self.duration.labels(record.method, record.model).observe(time.monotonic() - record.started)
        if record.time_to_first_token is not None:
            self.first_token.labels(record.model).observe(record.time_to_first_token)
        if record.totals is not None:
            self.prompt_tokens.labels(record.model).inc(record.totals.prompt_tokens)
            self.cached_tokens.labels(record.model).inc(record.totals.cached_tokens)
            self.generated_tokens.labels(record.model).inc(record.totals.candidate_tokens)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format 0.0.4."""
        return generate_latest(self._registry)

    def _bounded(self, name: str) -> str:
        if len(self._ignored_fields) < MAX_IGNORED_FIELDS:
            self._ignored_fields.add(name)
        return name if name in self._ignored_fields else "other"


_REJECTIONS = {413: "too_large", 429: "overloaded", 503: "unavailable"}


class _EngineCollector:
    """Reads each engine's health when somebody asks, so that no loop has to keep gauges fresh."""

    def __init__(self, models: Callable[[], Iterable[Served]]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        healths = [(entry.name, entry.health()) for entry in self._models()]
        for name, text, counter, value in _ENGINE_METRICS:
            family = (CounterMetricFamily if counter else GaugeMetricFamily)(name, text, labels=["model"])
            for model, health in healths:
                family.add_metric([model], value(health))
            yield family


_ENGINE_METRICS: tuple[tuple[str, str, bool, Callable[[Health], float]], ...] = (
    ("castor_model_ready", "1 if the model can answer.", False, lambda h: h.state == "ready"),
    ("castor_sequences_running", "Sequences in the running batch.", False, lambda h: h.stats.running),
    ("castor_sequences_waiting", "Sequences that wait for room.", False, lambda h: h.stats.waiting),
    ("castor_kv_blocks_used", "KV blocks that sequences hold.", False, lambda h: h.stats.used_blocks),
    ("castor_kv_blocks_cached", "Free KV blocks that the prefix cache keeps.", False, lambda h: h.stats.cached_blocks),
    ("castor_kv_blocks_total", "KV blocks of the pool.", False, lambda h: h.stats.total_blocks),
    ("castor_preemptions", "Sequences put back to be computed again later.", True, lambda h: h.stats.preemptions),
    ("castor_engine_steps", "Steps of the engine.", True, lambda h: h.stats.steps),
    ("castor_engine_restarts", "Times the engine process was started again.", True, lambda h: h.restarts),
)


def configure_logging(level: str) -> None:
    """One JSON object per line on stderr for everything, Castor's own and its libraries' (these from warnings on)."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel("WARNING")
    logging.getLogger("castor").setLevel(level.upper())

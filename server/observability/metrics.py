"""The metrics of a server: counters and histograms of its requests, and gauges of its engines.

Every label value is one of a few that the operator or this code chose. A client cannot make a new one: unknown models,
unknown methods and made-up HTTP methods all count under "".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Protocol, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.metrics import MetricWrapperBase

from engine.api.engine import Health
from server.config.field_paths import field_path
from server.observability.request_record import RequestRecord

MAX_IGNORED_FIELDS = 32
"""Distinct values of the ``field`` label; the names come from request bodies, so further ones count as "other"."""

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
M = TypeVar("M", bound=MetricWrapperBase)


class Served(Protocol):
    """A model as the metrics see it."""

    @property
    def name(self) -> str: ...

    def health(self) -> Health: ...


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
        _child(self.requests, record.method, record.model, str(record.status)).inc()
        if reason := record.rejected_for:
            _child(self.rejected, reason).inc()
        for name in {field_path(path): None for path in record.ignored}:
            if len(self._ignored_fields) < MAX_IGNORED_FIELDS:
                self._ignored_fields.add(name)
            _child(self.ignored_fields, name if name in self._ignored_fields else "other").inc()
        if record.method:
            _child(self.duration, record.method, record.model).observe(time.monotonic() - record.started)
        if record.time_to_first_token is not None:
            _child(self.first_token, record.model).observe(record.time_to_first_token)
        if record.totals is not None:
            _child(self.prompt_tokens, record.model).inc(record.totals.prompt_tokens)
            _child(self.cached_tokens, record.model).inc(record.totals.cached_tokens)
            _child(self.generated_tokens, record.model).inc(record.totals.candidate_tokens)

    def token_gap(self, model: str, seconds: float) -> None:
        """Add the time between two tokens of a candidate."""
        _child(self.between_tokens, model).observe(seconds)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format 0.0.4."""
        return generate_latest(self._registry)


@lru_cache(4096)
def _child(metric: M, *labels: str) -> M:
    """The metric's own search for the values of its labels takes longer than to count."""
    return metric.labels(*labels)


class _EngineCollector:
    """Reads each engine's health at each scrape, so that no loop has to keep gauges fresh."""

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
    ("castor_state_slots_used", "Slots of recurrent states that sequences hold.", False, lambda h: h.stats.used_slots),
    ("castor_state_snapshots", "Recurrent states that the prefix cache keeps.", False, lambda h: h.stats.snapshots),
    ("castor_kv_blocks_total", "KV blocks of the pool.", False, lambda h: h.stats.total_blocks),
    ("castor_preemptions", "Sequences put back to be computed again later.", True, lambda h: h.stats.preemptions),
    ("castor_engine_steps", "Steps of the engine.", True, lambda h: h.stats.steps),
    ("castor_tokens_sampled", "Tokens that were sampled.", True, lambda h: h.stats.sampled_tokens),
    ("castor_tokens_redrawn", "Tokens that a GPU had to sample again.", True, lambda h: h.stats.redrawn_tokens),
    ("castor_engine_restarts", "Times the engine process was started again.", True, lambda h: h.restarts),
)

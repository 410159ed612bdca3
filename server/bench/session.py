"""One server in one round: the loads that a scenario puts on it, and their measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from server.bench.load import Load, Target, closed_loop, open_loop, poisson_arrivals
from server.bench.prompts import Prompts
from server.bench.results.measure import Limits, Summary, summarise
from server.bench.usage import Usage, watched
from server.bench.wire.client import HttpError, get
from server.bench.wire.protocols import Call
from server.config.errors import ConfigError

WARM_UP_TOKENS = 4
LEAST_REQUESTS = 16
"""The minimum of a load: a median of fewer says little, and the start and the end, with idle streams, dominate."""
MOST_TIMES = 10
"""A load makes at most this many times its minimum requests, even if they take less than its minimum duration."""
DEFAULT_LIMITS = Limits(ttft=2.0, tpot=0.2)
"""What a reader of a chat tolerates from a small model on two CPU cores under load."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The sizes of a run. ``tokens`` bounds each answer; ``prompt_tokens`` is the approximate length of prompts.

    ``shares`` are arrival rates as shares of the server's maximum, ``rates`` are in requests per second. ``requests``
    is the minimum number of requests per stream, ``seconds`` the minimum duration of a load unless its requests run out
    first. ``limits`` are those of goodput.
    """

    scenario: str
    streams: tuple[int, ...]
    tokens: int
    prompt_tokens: int = 0
    requests: int = 2
    seconds: float = 10.0
    rounds: int = 3
    rates: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    limits: Limits = DEFAULT_LIMITS
    weights_bytes: int | None = None
    seed: int = 0

    @property
    def most_streams(self) -> int:
        """The largest number of concurrent requests in closed loops."""
        return max(self.streams)

    def least(self, streams: int) -> int:
        """The minimum number of requests of a load on ``streams`` streams."""
        return max(streams * self.requests, LEAST_REQUESTS)

    def most(self, streams: int) -> int:
        """The maximum number: this many are drawn for every server, so that all get the same ones in the same order."""
        return self.least(streams) * (MOST_TIMES if self.seconds else 1)


@dataclass(slots=True)
class Measurement:
    """A load on a server in a round, or, without ``load``, numbers that were not measured on a server."""

    server: str
    round: int
    name: str
    kind: str = ""
    streams: int | None = None
    rate: float | None = None
    load: Load | None = None
    summary: Summary | None = None
    usage: Usage = field(default_factory=Usage)
    numbers: dict[str, float] = field(default_factory=dict)


OnMeasurement = Callable[[Measurement], None]
"""Called with each measurement as soon as there is one."""


@dataclass(slots=True)
class Session:
    """One server in one round. ``on_measurement`` gets each load that has ended; ``facts`` are added to its numbers."""

    target: Target
    plan: Plan
    prompts: Prompts
    round: int
    on_measurement: OnMeasurement
    facts: Mapping[str, float] = field(default_factory=dict)

    async def warm_up(self) -> None:
        """Send short requests that are not measured, as many at once as there will be. Raises ``ConfigError`` if one
        fails."""
        for streams in self.plan.streams:
            load = await closed_loop(self.target, self.prompts.stories(streams, WARM_UP_TOKENS), streams)
            errors = [outcome.error for outcome in load.outcomes if outcome.error]
            if errors:
                raise ConfigError(f"{self.target.name} at {self.target.url} cannot answer: {errors[0]}")

    async def closed(self, name: str, calls: Sequence[Call], streams: int) -> Measurement:
        """Run a closed loop of ``streams`` streams for as long as the plan asks and ``calls`` last."""
        least, seconds = self.plan.least(streams), self.plan.seconds
        with watched(self.target.pid) as usage:
            load = await closed_loop(self.target, calls, streams, least=least, seconds=seconds)
        return self.add(name, load, usage, kind="closed loop", streams=streams)

    async def open(self, name: str, calls: Sequence[Call], rate: float) -> Measurement:
        """Run Poisson arrivals at ``rate`` requests per second for as long as the plan asks and ``calls`` last."""
        seed = self.plan.seed * 1000 + self.round
        number = max(self.plan.least(self.plan.most_streams), math.ceil(rate * self.plan.seconds))
        calls = calls[:number]
        with watched(self.target.pid) as usage:
            load = await open_loop(self.target, calls, poisson_arrivals(rate, len(calls), seed))
        return self.add(name, load, usage, kind="Poisson arrivals", rate=rate)

    def add(
        self,
        name: str,
        load: Load,
        usage: Usage,
        *,
        kind: str,
        streams: int | None = None,
        rate: float | None = None,
    ) -> Measurement:
        """Record a load. Raises ``ConfigError`` if all its requests failed."""
        if all(outcome.error for outcome in load.outcomes):
            first = load.outcomes[0].error
            raise ConfigError(f"{self.target.name} failed every request of the load {name!r}: {first}")
        summary = summarise(load, self.plan.limits)
        measurement = Measurement(self.target.name, self.round, name, kind, streams, rate, load, summary, usage)
        measurement.numbers |= self.facts
        self.on_measurement(measurement)
        return measurement

    async def metric(self, name: str) -> float:
        """The sum of a metric's samples at /metrics. Raises ``ConfigError`` if the server exports no such metric."""
        headers = self.target.dialect.headers(self.target.api_key)
        try:
            status, body = await get(self.target.url, "/metrics", headers)
        except (HttpError, OSError) as error:
            raise ConfigError(f"{self.target.name} does not answer at /metrics: {error}") from None
        found = metric_samples(body.decode(errors="replace"), name) if status == 200 else []
        if not found:
            raise ConfigError(f"{self.target.name} exports no {name} at /metrics, which {self.plan.scenario} needs")
        return sum(found)


def metric_samples(text: str, name: str) -> list[float]:
    """The values of a metric in Prometheus' text format."""
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    values = [value for series, _, value in lines if series.partition("{")[0] == name]
    try:
        return [float(value) for value in values]
    except ValueError:  # not in that format
        return []

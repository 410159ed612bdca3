"""One server in one round: the loads that a scenario puts on it, and what they gave."""

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
"""Of a load: a median of fewer says little, and the start and the end, when streams stand empty, would say too much."""
MOST_TIMES = 10
"""How many times the least requests a load makes at most, where that takes less than its seconds."""
DEFAULT_LIMITS = Limits(ttft=2.0, tpot=0.2)
"""What a reader of a chat bears; for a small model on two CPU cores under load."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The sizes of a run. ``tokens`` bounds each answer; ``prompt_tokens`` is about the length of prompts.

    ``shares`` are arrival rates as shares of what the server can do at most, ``rates`` are in requests a second.
    ``requests`` is how many each stream makes one after the other at least, ``seconds`` how long a load lasts at least
    where its requests are not used up before. ``limits`` are those of goodput.
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
        """How many requests there are at once at most in closed loops."""
        return max(self.streams)

    def least(self, streams: int) -> int:
        """How many requests a load on so many streams makes at least."""
        return max(streams * self.requests, LEAST_REQUESTS)

    def most(self, streams: int) -> int:
        """How many it may make: so many are drawn for every server, so that all get the same ones in the same order."""
        return self.least(streams) * (MOST_TIMES if self.seconds else 1)


@dataclass(slots=True)
class Measurement:
    """A load on a server in a round, or, without ``load``, numbers that were measured beside the servers."""

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
        """Short requests, as many at once as there will be, that count nowhere. Raises ``ConfigError`` if one fails."""
        for streams in self.plan.streams:
            load = await closed_loop(self.target, self.prompts.stories(streams, WARM_UP_TOKENS), streams)
            errors = [outcome.error for outcome in load.outcomes if outcome.error]
            if errors:
                raise ConfigError(f"{self.target.name} at {self.target.url} cannot answer: {errors[0]}")

    async def closed(self, name: str, calls: Sequence[Call], streams: int) -> Measurement:
        """A closed loop of so many streams, for as long as the plan wants it and ``calls`` last."""
        least, seconds = self.plan.least(streams), self.plan.seconds
        with watched(self.target.pid) as usage:
            load = await closed_loop(self.target, calls, streams, least=least, seconds=seconds)
        return self.add(name, load, usage, kind="closed loop", streams=streams)

    async def open(self, name: str, calls: Sequence[Call], rate: float) -> Measurement:
        """Poisson arrivals at so many requests a second, for as long as the plan wants it and ``calls`` last."""
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
        """Keep what a load gave. Raises ``ConfigError`` if nothing came of it at all."""
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

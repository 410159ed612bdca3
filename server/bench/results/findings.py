"""Evaluates the measurements of all rounds: medians for each load, ratios between servers, and findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import TypeVar

from server.bench.results.measure import Spread, Summary, spread
from server.bench.session import Measurement

Size = TypeVar("Size", int, float)

Loads = dict[str, Measurement]
"""The measurements of one server in one round, by the name of the load."""

SUMMARY_NUMBERS = tuple(field.name for field in fields(Summary) if field.name != "counted_by")
RATIOS = ("output_tokens_per_second", "ttft_p50", "itl_p50", "e2e_p50")


@dataclass(frozen=True, slots=True)
class Finding:
    """An answer to a scenario's question: median, least and most over the rounds. ``goal`` is the target."""

    name: str
    server: str
    value: Spread
    unit: str
    goal: str = ""


@dataclass(frozen=True, slots=True)
class LoadTotals:
    """A load on a server over all rounds. ``most_other_cores``: cores that other processes used in the worst round."""

    server: str
    load: str
    kind: str
    streams: int | None
    numbers: dict[str, Spread]
    peak_rss: int | None
    last_pss: int | None
    most_other_cores: float | None
    counted_by: str


@dataclass(frozen=True, slots=True)
class Ratio:
    """Castor's number over the peer's under the same load, from the rounds that have both."""

    peer: str
    load: str
    number: str
    value: Spread


class Results:
    """All measurements of a run."""

    def __init__(self, measurements: Sequence[Measurement]) -> None:
        # The order of measurement means nothing: Castor comes first, then the peers in the order of the first round.
        self.measurements = sorted(measurements, key=lambda m: (m.round, m.server != "castor"))
        self.rounds = sorted({measurement.round for measurement in measurements})
        self.servers = list(dict.fromkeys(m.server for m in measurements if m.load is not None))
        self.loads = list(dict.fromkeys(m.name for m in measurements if m.load is not None))

    def of(self, server: str, number: int) -> Loads:
        """The measurements of a server in a round."""
        return {m.name: m for m in self.measurements if m.server == server and m.round == number}

    def each_round(self, server: str, value: Callable[[Loads], float | None]) -> Spread | None:
        """A number over the rounds; rounds that lack what it needs are left out."""
        return self.over_rounds(lambda number: value(self.of(server, number)))

    def over_rounds(self, value: Callable[[int], float | None]) -> Spread | None:
        """A number of each round; rounds that lack a measurement it needs are left out."""

        def of_round(number: int) -> float | None:
            try:
                return value(number)
            except KeyError:
                return None

        return spread(map(of_round, self.rounds))

    def totals(self) -> list[LoadTotals]:
        """The medians of every load on every server."""
        totals = []
        for server, load in product(self.servers, self.loads):
            found = [m for m in self.measurements if m.server == server and m.name == load and m.summary is not None]
            if not found:
                continue
            numbers = {name: spread(number_of(m, name) for m in found) for name in SUMMARY_NUMBERS}
            total = LoadTotals(
                server,
                load,
                found[0].kind,
                found[0].streams,
                {name: value for name, value in numbers.items() if value is not None},
                _most(m.usage.peak_rss for m in found),
                _most(m.usage.last_pss for m in found),
                _most(m.usage.other_cores for m in found),
                "+".join(sorted({m.summary.counted_by for m in found if m.summary is not None})),
            )
            totals.append(total)
        return totals

    def ratios(self) -> list[Ratio]:
        """The first server against each other one."""
        first, *peers = self.servers or [""]
        return [
            Ratio(peer, load, number, value)
            for peer in peers
            for load in self.loads
            for number in RATIOS
            if (value := spread(self._ratios(first, peer, load, number))) is not None
        ]

    def _ratios(self, first: str, peer: str, load: str, number: str) -> Iterator[float | None]:
        for index in self.rounds:
            ours, theirs = self.of(first, index).get(load), self.of(peer, index).get(load)
            # Arrivals at a share of what each server can do are not the same load.
            if ours is not None and theirs is not None and ours.rate == theirs.rate:
                yield quotient(number_of(ours, number), number_of(theirs, number))


def _most(values: Iterable[Size | None]) -> Size | None:
    return max((value for value in values if value is not None), default=None)


def number_of(measurement: Measurement | None, name: str) -> float | None:
    """A number of a measurement, by its name in ``Summary``."""
    if measurement is None or measurement.summary is None:
        return None
    value: float | None = getattr(measurement.summary, name)
    return value


def quotient(above: float | None, below: float | None) -> float | None:
    """The quotient, None where it has no meaning."""
    return above / below if above is not None and below else None

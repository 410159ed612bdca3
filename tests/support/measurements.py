"""Measurements of a load generator that was never run, and what scenarios find in them."""

from __future__ import annotations

from server.bench.load import Load
from server.bench.results.findings import Results
from server.bench.results.measure import Limits, Spread, summarise
from server.bench.scenarios import Scenario
from server.bench.session import Measurement
from server.bench.usage import Usage
from server.bench.wire.counting import Outcome


def measured(
    server: str, number: int, name: str, tokens: int = 100, ttft: float = 1.0, itl: float = 0.1
) -> Measurement:
    """A load of one request and one second that gave so many tokens."""
    outcome = Outcome(0.0, first=ttft, ended=2.0, output_tokens=tokens, counted_by="usage", gaps=[(itl, 1)] * 100)
    load = Load([outcome], 1.0, 0.01)
    summary = summarise(load, Limits(2.0, 0.2))
    return Measurement(
        server, number, name, "closed loop", 1, None, load, summary, Usage(20, 10 + number, 0.5, 0.1 * number)
    )


def found(scenario: Scenario, *measurements: Measurement) -> dict[tuple[str, str], Spread]:
    """The findings of a scenario by name and server."""
    assert scenario.find is not None
    findings = scenario.find(Results(measurements), scenario.plan)
    return {(finding.name, finding.server): finding.value for finding in findings}

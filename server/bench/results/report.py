"""A run as one JSON file with every raw number, and as tables for humans."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from server.bench.results.findings import Finding, LoadTotals, Results
from server.bench.results.measure import TAIL_SAMPLES, Spread
from server.bench.scenarios import Scenario
from server.bench.session import Measurement, Plan

FORMAT = 1
MIB = 1024 * 1024
NOISE_CORES = 0.1
"""Cores that other processes may use before a note mentions it."""


@dataclass(frozen=True, slots=True)
class ReportContent:
    """What was run: everything about a run except its results."""

    scenario: Scenario
    plan: Plan
    environment: dict[str, Any]

    def document(self, results: Results, findings: list[Finding], incomplete: str = "") -> dict[str, Any]:
        """Everything about the run; ``incomplete`` says what ended it early.

        Times are in seconds. ``requests`` hold the raw numbers of ``Outcome``.
        """
        return {
            "format": FORMAT,
            "scenario": self.plan.scenario,
            "question": self.scenario.question,
            "incomplete": incomplete,
            "sizes": "as given or as defaults for two CPU cores and a small model",
            "reference_sizes": self.scenario.reference,
            "plan": asdict(self.plan),
            "environment": self.environment,
            "totals": [asdict(total) for total in results.totals()],
            "ratios": [asdict(ratio) for ratio in results.ratios()],
            "findings": [asdict(finding) for finding in findings],
            "measurements": [_measurement(measurement) for measurement in results.measurements],
        }


def write(content: dict[str, Any], folder: Path) -> Path:
    """Write the file, named by date and scenario; a line for each entry of a list, so that it can be read and compared.

    Never overwrites: a second run of the same second gets another name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    moment = content["environment"]["date"].split("+")[0].replace(":", "")
    path = folder / f"{moment}-{content['scenario']}.json"
    number = 2
    while path.exists():
        path, number = path.with_name(f"{moment}-{content['scenario']}-{number}.json"), number + 1
    entries = []
    for key, value in content.items():
        lines = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if isinstance(value, list) and value else None
        entries.append(f"{json.dumps(key)}: {lines or json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n")
    return path


def show(results: Results, findings: Iterable[Finding], terminal: Console) -> None:
    """Print the tables (loads, ratios to the peers, findings), then the notes on how to read them."""
    totals = results.totals()
    if totals:
        terminal.print(_load_table(totals))
    ratios = [ratio for ratio in results.ratios() if ratio.number == "output_tokens_per_second"]
    if ratios:
        table = Table("load", "peer", "castor / peer", "least", "most", title="Output tokens/s against the peers")
        for ratio in ratios:
            value = ratio.value
            table.add_row(ratio.load, ratio.peer, *(f"{x:.2f} ×" for x in (value.median, value.least, value.most)))
        terminal.print(table)
    found = list(findings)
    if found:
        table = Table("finding", "server", "median", "least", "most", "unit", "goal", title="Findings")
        for finding in found:
            numbers = (finding.value.median, finding.value.least, finding.value.most)
            texts = (f"{number:.3g}" if abs(number) < 1000 else f"{number:.0f}" for number in numbers)
            table.add_row(finding.name, finding.server, *texts, finding.unit, finding.goal)
        terminal.print(table)
    for note in notes(totals):
        terminal.print(note, soft_wrap=True)


def notes(totals: Sequence[LoadTotals]) -> list[str]:
    """Notes on how to read the numbers."""
    lines = []
    for total in totals:
        where = f"{total.server}, {total.load}"
        errors = total.numbers["errors"].most
        if errors:
            lines.append(f"! {where}: up to {errors:.0f} requests of a round failed; the JSON has the reasons")
        if "chunks" in total.counted_by:
            lines.append(
                f"! {where}: the server reports no token counts; chunks, maybe of several tokens, were counted"
            )
        if (total.most_other_cores or 0.0) > NOISE_CORES:
            cores = f"{total.most_other_cores:.2f} cores"
            lines.append(f"! {where}: other processes used {cores} of this machine; measure on an idle one")
        share = total.numbers["client_cpu_share"].most
        if share > 0.25:
            lines.append(f"! {where}: the client itself used {share:.0%} of a core")
    if any(total.numbers["requests"].median < TAIL_SAMPLES for total in totals):
        lines.append(f"p99 needs at least {TAIL_SAMPLES} samples: with fewer it would be close to the maximum.")
    closed = any(total.kind == "closed loop" for total in totals)
    if closed:
        lines.append("A closed loop sends its next request after an answer: it says nothing of random arrivals.")
    return lines


def _load_table(totals: list[LoadTotals]) -> Table:
    columns = (
        "server",
        "load",
        "n",
        "tok/s",
        "TTFT p50",
        "p99",
        "ITL p50",
        "p99",
        "e2e p50",
        "tokens",
        "RSS MiB",
        "errors",
    )
    table = Table(*columns, title="Medians over the rounds; n requests in each; times in ms, tokens of a mean answer")
    for total in totals:
        numbers = total.numbers
        table.add_row(
            total.server,
            total.load + (" (open)" if total.kind.startswith("Poisson") else ""),
            _whole(numbers.get("requests")),
            _plain(numbers.get("output_tokens_per_second")),
            *(_plain(numbers.get(name), 1000) for name in ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "e2e_p50")),
            _plain(numbers.get("mean_output_tokens")),
            "–" if total.peak_rss is None else f"{total.peak_rss / MIB:.0f}",
            _whole(numbers.get("errors")),
        )
    return table


def _whole(value: Spread | None) -> str:
    return "–" if value is None else f"{value.median:.0f}"


def _plain(value: Spread | None, factor: float = 1) -> str:
    if value is None:
        return "–"
    number = value.median * factor
    return f"{number:.1f}" if abs(number) < 100 else f"{number:.0f}"


def _measurement(measurement: Measurement) -> dict[str, Any]:
    load, requests = measurement.load, []
    for outcome in [] if load is None else load.outcomes:
        values = asdict(outcome)
        values["gaps"] = [(round(seconds, 5), round(tokens, 3)) for seconds, tokens in outcome.gaps]
        requests.append({name: round(x, 5) if isinstance(x, float) else x for name, x in values.items()})
    return {
        "server": measurement.server,
        "round": measurement.round,
        "load": measurement.name,
        "kind": measurement.kind,
        "streams": measurement.streams,
        "rate": measurement.rate,
        "numbers": measurement.numbers,
        "usage": asdict(measurement.usage),
        "client_cpu_seconds": None if load is None else round(load.cpu_seconds, 4),
        "summary": None if measurement.summary is None else asdict(measurement.summary),
        "requests": requests,
    }

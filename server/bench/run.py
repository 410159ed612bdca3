"""A run from its measurements to its results: progress lines, tables, one JSON file and plots."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from server.bench.results import plots, report
from server.bench.results.findings import Results
from server.bench.session import Measurement, OnMeasurement
from server.config.errors import ConfigError

PLOTS_MISSING = "no plots: matplotlib is not installed; for them run: pip install 'castor-serve[bench]'"


def check_folder(folder: Path) -> None:
    """Create the folder for the results before anything is measured. Raises ``ConfigError`` if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise ConfigError(f"the output folder {folder} cannot be created: {reason}; name another: --output") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"the output folder {folder} is not writable; name another: --output")


def run(
    content: report.ReportContent, measure: Callable[[OnMeasurement], None], folder: Path, terminal: Console
) -> None:
    """Measure, print the tables, and write the JSON and the plots into the folder.

    What ``measure`` reported before it failed is written too, marked as incomplete; the error is still raised.
    """
    measurements: list[Measurement] = []

    def note(measurement: Measurement) -> None:
        measurements.append(measurement)
        terminal.print(_line(measurement), soft_wrap=True)

    scenario, plan = content.scenario, content.plan
    try:
        measure(note)
        results = Results(measurements)
        findings = scenario.find(results, plan) if scenario.find else []
        path = report.write(content.document(results, findings), folder)
    except BaseException as failure:
        if measurements:  # an hour of measurements is worth keeping, even if something failed afterwards
            path = report.write(content.document(Results(measurements), [], incomplete=repr(failure)), folder)
            terminal.print(f"incomplete; the measurements until then: {path}", soft_wrap=True)
        raise
    output = Console(highlight=False, markup=False, emoji=False)
    if not output.is_terminal:
        output = Console(highlight=False, markup=False, emoji=False, width=140)
    report.show(results, findings, output)
    terminal.print(f"all numbers: {path}", soft_wrap=True)
    if results.loads and not plots.can_plot():
        terminal.print(PLOTS_MISSING, soft_wrap=True)
    elif results.loads:
        picture = path.with_suffix(".png")
        plots.plot(results, f"{plan.scenario}: {plan.tokens} tokens, rounds: {plan.rounds}", picture)
        terminal.print(f"plots: {picture}", soft_wrap=True)


def _line(measurement: Measurement) -> str:
    start = f"round {measurement.round + 1}, {measurement.server}, {measurement.name}"
    if measurement.summary is None:
        return f"{start}: " + ", ".join(f"{name} {value:.4g}" for name, value in measurement.numbers.items())
    summary = measurement.summary
    failed = f", {summary.errors} of {summary.requests} failed" if summary.errors else ""
    return f"{start}: {summary.output_tokens_per_second:.1f} tok/s in {summary.seconds:.1f} s{failed}"

"""The JSON and the tables of a run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from server.bench.load import Load
from server.bench.results import plots, report
from server.bench.results.findings import Finding, Results
from server.bench.results.measure import Limits, Spread, summarise
from server.bench.scenarios import SCENARIOS
from server.bench.session import Measurement
from server.bench.usage import Usage
from server.bench.wire.counting import Outcome

SCENARIO = SCENARIOS["throughput"]
ENVIRONMENT = {"date": "2026-01-02T03:04:05+00:00", "command": "castor bench"}
CONTENT = report.ReportContent(SCENARIO, SCENARIO.plan, ENVIRONMENT)


def measured(server: str, counted_by: str = "usage", cpu: float = 0.01) -> Measurement:
    good = Outcome(0.0, first=0.5, ended=1.0, output_tokens=3, counted_by=counted_by, gaps=[(0.123456789, 1), (0.2, 1)])
    bad = Outcome(0.0, error="HTTP 429: queue full")
    load = Load([good, bad], 2.0, cpu)
    summary = summarise(load, Limits(1, 1))
    return Measurement(server, 0, "1 stream", "closed loop", 1, None, load, summary, Usage(other_cores=0.75))


@pytest.fixture
def results() -> Results:
    return Results([measured("castor"), measured("llama.cpp", "chunks", 0.9)])


def test_the_file_holds_every_number(results: Results, tmp_path: Path) -> None:
    findings = [Finding("ratio", "castor", Spread(1.0, 0.9, 1.1, 3), "×", "at least 1")]
    path = report.write(CONTENT.document(results, findings), tmp_path / "new")
    assert path.name == "2026-01-02T030405-throughput.json"
    content = json.loads(path.read_text())
    assert set(content) == {
        *("format", "scenario", "question", "incomplete", "sizes", "reference_sizes", "plan", "environment"),
        *("totals", "ratios", "findings", "measurements"),
    }
    assert content["environment"] == ENVIRONMENT
    assert content["plan"]["streams"] == [1, 4, 16, 64]
    assert content["findings"][0]["value"] == {"median": 1.0, "least": 0.9, "most": 1.1, "rounds": 3}
    (first, _second) = content["measurements"]
    assert (first["server"], first["load"], first["summary"]["errors"]) == ("castor", "1 stream", 1)
    good, bad = first["requests"]
    assert good["gaps"] == [[0.12346, 1], [0.2, 1]]
    assert (good["first"], good["output_tokens"], bad["error"]) == (0.5, 3, "HTTP 429: queue full")
    assert {ratio["number"] for ratio in content["ratios"]} >= {"output_tokens_per_second", "ttft_p50"}


def test_a_file_is_never_overwritten(results: Results, tmp_path: Path) -> None:
    content = CONTENT.document(results, [])
    names = [report.write(content, tmp_path).name for _ in range(3)]
    assert names[1:] == ["2026-01-02T030405-throughput-2.json", "2026-01-02T030405-throughput-3.json"]


def test_the_tables_say_what_must_be_known(results: Results) -> None:
    out = io.StringIO()
    report.show(results, [Finding("cost", "castor", Spread(8, 7, 9, 3), "%")], Console(file=out, width=140))
    text = out.getvalue()
    for words in (
        *("castor / peer", "1.00 ×", "cost", "llama.cpp, 1 stream: up to 1 requests of a round failed"),
        *(
            "reports no token counts; chunks, maybe",
            "used 45% of a core",
            "A closed loop sends its next request after an answer",
        ),
        *("other processes used 0.75 cores", "p99 needs at least 100 samples"),
    ):
        assert words in text


def test_plots(results: Results, tmp_path: Path) -> None:
    assert plots.can_plot()
    plots.plot(results, "a run", tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_plots_without_any_latency(tmp_path: Path) -> None:
    load = Load([Outcome(0.0, first=0.5, ended=1.0, output_tokens=1)], 1.0, 0.1)
    alone = Measurement("castor", 0, "1 stream", "closed loop", 1, None, load, summarise(load, Limits(1, 1)))
    plots.plot(Results([alone]), "a run", tmp_path / "run.png")
    assert (tmp_path / "run.png").is_file()

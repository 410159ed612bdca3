"""Whole runs over small servers in processes of their own."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import sse_server

from benchmarks.harness.beside import Beside
from benchmarks.harness.contenders import Contender, Sizes, started
from engine.api.engine import EngineConfig
from server.bench.prompts import Prompts
from server.bench.rounds import measure_own
from server.bench.scenarios import SCENARIOS
from server.bench.session import Measurement, Plan
from server.bench.wire.protocols import Gemini
from server.commands.bench import Options, bench
from server.config.errors import ConfigError
from server.config.settings import Settings

PROGRAM = str(Path(sse_server.__file__).with_name("small_gemini.py"))
PLAN = Plan("throughput", (1, 2), tokens=4, requests=1, rounds=3, seconds=0)


@pytest.fixture(autouse=True)
def _same_signals() -> Iterator[None]:
    """A run sets a handler; the tests after it have their own."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def small(name: str, folder: Path, limit: int = 1000) -> Contender:
    log = folder / f"{name}.log"

    def command(port: int, _sizes: Sizes) -> list[str]:
        return [sys.executable, PROGRAM, str(port), str(log), str(limit)]

    weights = folder / "weights"
    weights.write_bytes(b"12345")
    return Contender(name, Gemini(), "small", "/", command, weights, Path(sys.executable), ())


def test_servers_take_turns_and_get_the_same_prompts(tmp_path: Path) -> None:
    told: list[Measurement] = []
    beside = Beside(EngineConfig(path=""), PLAN, Prompts(0))
    contenders = [small("castor", tmp_path), small("other", tmp_path)]
    measure_own(SCENARIOS["throughput"], PLAN, contenders, beside, 1, told.append)
    assert [(m.round, m.server, m.name) for m in told if m.name == "1 stream"] == [
        *[(0, "castor", "1 stream"), (0, "other", "1 stream")],
        *[(1, "other", "1 stream"), (1, "castor", "1 stream")],
        *[(2, "castor", "1 stream"), (2, "other", "1 stream")],
    ]
    assert all(m.numbers == {"weights_bytes": 5} for m in told)
    ours, theirs = (sorted((tmp_path / f"{name}.log").read_text().splitlines()) for name in ("castor", "other"))
    assert ours == theirs
    assert len(set(ours)) == len(ours) == PLAN.rounds * (1 + 2 + 16 + 16)


def run(url: str, folder: Path) -> None:
    options = Options(url=url, streams=(1, 2), requests=1, rounds=2, tokens=4, seconds=0, output=folder / "results")
    bench(options, Settings(data_dir=folder, cache_dir=folder))


def test_a_server_that_somebody_else_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with started(small("castor", tmp_path), Sizes(1, 1, 1)) as target:
        run(str(target.url), tmp_path)
    (path,) = (tmp_path / "results").glob("*.json")
    content = json.loads(path.read_text())
    assert content["incomplete"] == ""
    assert [m["round"] for m in content["measurements"]] == [0, 0, 1, 1]
    assert path.with_suffix(".png").is_file()
    told = capsys.readouterr()
    assert "Medians over the rounds" in told.out
    assert "round 2, server, 2 streams" in told.err


def test_a_run_that_fails_keeps_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        started(small("castor", tmp_path, limit=3 + 32 + 3), Sizes(1, 1, 1)) as target,
        pytest.raises(ConfigError, match=r"server failed every request of the load '1 stream': HTTP 500: worn out"),
    ):
        run(str(target.url), tmp_path)
    (path,) = (tmp_path / "results").glob("*.json")
    content = json.loads(path.read_text())
    assert "worn out" in content["incomplete"]
    assert [m["load"] for m in content["measurements"]] == ["1 stream", "2 streams"]
    assert "what was measured until then" in capsys.readouterr().err


def test_a_run_keeps_what_it_measured_whatever_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setitem(SCENARIOS, "throughput", replace(SCENARIOS["throughput"], find=broken))
    with (
        started(small("castor", tmp_path), Sizes(1, 1, 1)) as target,
        pytest.raises(RuntimeError, match="a mistake of ours"),
    ):
        run(str(target.url), tmp_path)
    (path,) = (tmp_path / "results").glob("*.json")
    content = json.loads(path.read_text())
    assert "a mistake of ours" in content["incomplete"]
    assert len(content["measurements"]) == 4


def test_results_that_cannot_be_written_are_known_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    with pytest.raises(ConfigError, match="results cannot be made: File exists; name another: --output"):
        run("http://127.0.0.1:9", tmp_path)

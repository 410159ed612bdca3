"""Rounds over small servers in processes of their own."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.small_server import small_command

from benchmarks.harness.beside import Beside
from benchmarks.harness.contenders import Contender, Sizes
from benchmarks.harness.rounds import measure_own
from benchmarks.harness.scenarios import SCENARIOS
from engine.api.engine import EngineConfig
from server.bench.prompts import Prompts
from server.bench.session import Measurement, Plan
from server.bench.wire.protocols import Gemini

PLAN = Plan("throughput", (1, 2), tokens=4, requests=1, rounds=3, seconds=0)


@pytest.fixture(autouse=True)
def _same_signals() -> Iterator[None]:
    """A run sets a handler; the tests after it have their own."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def small(name: str, folder: Path) -> Contender:
    log = folder / f"{name}.log"

    def command(port: int, _sizes: Sizes) -> list[str]:
        return small_command(port, log, limit=1000)

    weights = folder / "weights"
    weights.write_bytes(b"12345")
    return Contender(name, Gemini(), "small", "/", command, weights, Path(sys.executable), ())


def test_servers_take_turns_and_get_the_same_prompts(tmp_path: Path) -> None:
    noted: list[Measurement] = []
    beside = Beside(EngineConfig(path=""), PLAN, Prompts(0))
    contenders = [small("castor", tmp_path), small("other", tmp_path)]
    measure_own(SCENARIOS["throughput"], PLAN, contenders, beside, 1, noted.append)
    assert [(m.round, m.server, m.name) for m in noted if m.name == "1 stream"] == [
        *[(0, "castor", "1 stream"), (0, "other", "1 stream")],
        *[(1, "other", "1 stream"), (1, "castor", "1 stream")],
        *[(2, "castor", "1 stream"), (2, "other", "1 stream")],
    ]
    assert all(m.numbers == {"weights_bytes": 5} for m in noted)
    ours, theirs = (sorted((tmp_path / f"{name}.log").read_text().splitlines()) for name in ("castor", "other"))
    assert ours == theirs
    assert len(set(ours)) == len(ours) == PLAN.rounds * (1 + 2 + 16 + 16)

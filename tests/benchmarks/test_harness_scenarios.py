"""The scenarios on this machine, and what those with a program beside the servers find."""

from __future__ import annotations

import pytest
from support.measurements import found, measured

from benchmarks.harness.beside import PROGRAM_RUNS
from benchmarks.harness.contenders import PEERS
from benchmarks.harness.scenarios import BARE_CORE, MACHINE, SCENARIOS
from server.bench import scenarios as running
from server.bench.session import Measurement


def test_every_scenario_has_something_to_measure() -> None:
    assert set(SCENARIOS) - set(running.SCENARIOS) == {"R1", "R7", "frontend"}
    for name, local in SCENARIOS.items():
        assert local.scenario.plan.scenario == name
        assert local.scenario.question.endswith("?")
        assert local.scenario.load or local.beside
        assert local.beside in {None, *PROGRAM_RUNS}
        assert set(local.peers) <= set(PEERS)
        assert local.scenario.context(local.scenario.plan) % 256 == 0


def test_the_share_of_the_memory_bandwidth() -> None:
    decode = measured("castor", 0, "1 stream", itl=0.1)
    decode.numbers["weights_bytes"] = 500.0
    findings = found(
        SCENARIOS["R1"].scenario,
        decode,
        Measurement(MACHINE, 0, "bandwidth", numbers={"copy": 10_000.0, "read": 9_000.0}),
    )
    assert findings["weights are read at", "castor"].median == pytest.approx(0.5)
    assert findings["copy bandwidth", MACHINE].median == pytest.approx(1e-5)


def test_the_cost_of_the_front_end() -> None:
    bare = Measurement(BARE_CORE, 0, "64 streams", numbers={"output_tokens_per_second": 100.0})
    findings = found(SCENARIOS["frontend"].scenario, measured("castor", 0, "64 streams", 92), bare)
    assert findings["HTTP, process border and client at 64 streams", "castor"].median == pytest.approx(8.0)


def test_steps_of_the_scheduler() -> None:
    names = [f"{part}_us_{number}" for part in ("schedule", "step") for number in ("mean", "p50", "p99")]
    findings = found(SCENARIOS["R7"].scenario, Measurement("castor", 0, "steps", numbers=dict.fromkeys(names, 5.0)))
    assert len(findings) == 6
    assert {value.median for value in findings.values()} == {5.0}

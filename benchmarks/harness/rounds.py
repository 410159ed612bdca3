"""The rounds of a comparison: each server is measured alone, in rotating order, so that drift affects all alike."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType

from benchmarks.harness.beside import Beside
from benchmarks.harness.contenders import Contender, Sizes, started
from benchmarks.harness.scenarios import LocalScenario
from benchmarks.harness.weights import bytes_per_token
from server.bench.prompts import Prompts
from server.bench.rounds import put_load
from server.bench.session import OnMeasurement, Plan, Session


def measure_own(
    local: LocalScenario,
    plan: Plan,
    contenders: Sequence[Contender],
    beside: Beside,
    threads: int,
    on_measurement: OnMeasurement,
) -> None:
    """Start, measure and end each server in each round. Raises ``ConfigError``."""

    def end(_signal: int, _frame: FrameType | None) -> None:
        sys.exit(128 + signal.SIGTERM)

    # SIGTERM unwinds like Ctrl-C, so that no server outlives its benchmark.
    signal.signal(signal.SIGTERM, end)
    scenario = local.scenario
    sizes = Sizes(plan.most_streams + scenario.spare, scenario.context(plan), threads)
    prompts = {contender.name: Prompts(plan.seed) for contender in contenders}
    for number in range(plan.rounds):
        first = number % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]] if scenario.load else []:
            weights = plan.weights_bytes if contender.name == "castor" else None
            if weights is None:
                weights = bytes_per_token(contender.weights)
            with started(contender, sizes) as target:
                facts = {"weights_bytes": weights}
                put_load(scenario, Session(target, plan, prompts[contender.name], number, on_measurement, facts))
        if local.beside:
            for measurement in beside.run(local.beside, number):
                on_measurement(measurement)

"""The rounds of a run: in each, every server is measured alone, in turning order, so that drift hits all alike."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from benchmarks.harness.beside import Beside
from benchmarks.harness.contenders import Contender, Sizes, started
from benchmarks.harness.weights import bytes_per_token
from server.bench.load import Target
from server.bench.prompts import Prompts
from server.bench.scenarios import Scenario
from server.bench.session import Measurement, Plan, Session

Tell = Callable[[Measurement], None]


def measure_own(
    scenario: Scenario, plan: Plan, contenders: Sequence[Contender], beside: Beside, threads: int, tell: Tell
) -> None:
    """Start, measure and end each server, with so many threads, in each round. Raises ``ConfigError``."""
    _end_with_us()
    sizes = Sizes(plan.most_streams + scenario.spare, scenario.context(plan), threads)
    prompts = {contender.name: Prompts(plan.seed) for contender in contenders}
    for number in range(plan.rounds):
        for contender in _turned(contenders, number) if scenario.load else []:
            weights = _weights_bytes(contender, plan)
            with started(contender, sizes) as target:
                session = Session(target, plan, prompts[contender.name], number, tell, {"weights_bytes": weights})
                _measure(scenario, session)
        if scenario.beside:
            for measurement in beside.run(scenario.beside, number):
                tell(measurement)


def measure_running(scenario: Scenario, plan: Plan, target: Target, tell: Tell) -> None:
    """Measure a server that somebody else runs, in as many rounds."""
    prompts = Prompts(plan.seed)
    for number in range(plan.rounds):
        _measure(scenario, Session(target, plan, prompts, number, tell))


def _measure(scenario: Scenario, session: Session) -> None:
    assert scenario.load is not None
    load = scenario.load

    async def run() -> None:
        await session.warm_up()
        await load(session)

    asyncio.run(run())


def _turned(contenders: Sequence[Contender], number: int) -> list[Contender]:
    place = number % len(contenders)
    return [*contenders[place:], *contenders[:place]]


def _weights_bytes(contender: Contender, plan: Plan) -> float:
    if contender.name == "castor" and plan.weights_bytes is not None:
        return plan.weights_bytes
    return bytes_per_token(contender.weights, packed=contender.name == "castor")


def _end_with_us() -> None:
    """Have SIGTERM unwind like Ctrl-C does, so that no server outlives its benchmark."""

    def end(_signal: int, _frame: FrameType | None) -> None:
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)

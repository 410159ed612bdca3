"""The rounds of a run: each puts the load of a scenario on a server."""

from __future__ import annotations

import asyncio

from server.bench.load import Target
from server.bench.prompts import Prompts
from server.bench.scenarios import Scenario
from server.bench.session import OnMeasurement, Plan, Session


def measure_running(scenario: Scenario, plan: Plan, target: Target, on_measurement: OnMeasurement) -> None:
    """Measure a server that is already running, in every round of the plan. Raises ``ConfigError``."""
    prompts = Prompts(plan.seed)
    for number in range(plan.rounds):
        put_load(scenario, Session(target, plan, prompts, number, on_measurement))


def put_load(scenario: Scenario, session: Session) -> None:
    """Warm up a server and put the scenario's load on it. Raises ``ConfigError``."""
    load = scenario.load
    assert load is not None, "a scenario without a load needs no server"

    async def run() -> None:
        await session.warm_up()
        await load(session)

    asyncio.run(run())

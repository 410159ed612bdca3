"""The scenarios on this machine: those for a running server, and those that measure without a server.

R1 and R7 belong to the project's reference set, like R2 to R6 of ``server.bench.scenarios``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.harness.contenders import LLAMA_CPP, PEERS
from server.bench import loads
from server.bench import scenarios as running
from server.bench.loads import streams_name
from server.bench.results.findings import Finding, Loads, Results, number_of
from server.bench.scenarios import ANSWERS, TOKENS_PER_SECOND, Scenario, each_server
from server.bench.session import Plan

MACHINE, BARE_CORE = "this machine", "bare core"
"""The names under which programs without a server report."""


@dataclass(frozen=True, slots=True)
class LocalScenario:
    """A scenario whose servers are started here. ``peers`` can be compared with Castor under its load.

    ``beside`` names a program of benchmarks/ that measures something in each round while no server runs.
    """

    scenario: Scenario
    peers: tuple[str, ...] = PEERS
    beside: str | None = None


def _bandwidth_share(results: Results, _plan: Plan) -> list[Finding]:
    load = streams_name(1)

    def copy(number: int) -> float:
        return results.of(MACHINE, number)["bandwidth"].numbers["copy"]

    def share_of(server: str) -> Callable[[int], float | None]:
        def share(number: int) -> float | None:
            measured = results.of(server, number)[load]
            seconds = number_of(measured, "tpot_p50")
            return None if seconds is None else measured.numbers["weights_bytes"] / seconds / copy(number)

        return share

    findings = each_server(
        results, "copy bandwidth", "GB/s", "", lambda found: found["bandwidth"].numbers["copy"] / 1e9
    )
    findings += each_server(
        results, "read bandwidth", "GB/s", "", lambda found: found["bandwidth"].numbers["read"] / 1e9
    )
    for server in results.servers:
        value = results.over_rounds(share_of(server))
        if value is not None:
            goal = "0.75 of a GPU's datasheet" if server == "castor" else ""
            findings.append(Finding("weights are read at", server, value, "of copy bandwidth", goal))
    return findings


def _front_end(results: Results, plan: Plan) -> list[Finding]:
    def cost(load: str) -> Callable[[int], float | None]:
        def of_round(number: int) -> float | None:
            served = number_of(results.of("castor", number)[load], TOKENS_PER_SECOND)
            bare = results.of(BARE_CORE, number)[load].numbers[TOKENS_PER_SECOND]
            return None if served is None else 100 * (1 - served / bare)

        return of_round

    def bare(load: str) -> Callable[[Loads], float | None]:
        return lambda found: found[load].numbers[TOKENS_PER_SECOND]

    findings = []
    for load in map(streams_name, plan.streams):
        findings += each_server(results, f"output at {load}", "tok/s", "", bare(load))
        value = results.over_rounds(cost(load))
        if value is not None:
            name = f"HTTP, process border and client at {load}"
            findings.append(Finding(name, "castor", value, "% of the output", "at most 10 at 64"))
    return findings


def _scheduler(results: Results, _plan: Plan) -> list[Finding]:
    def number(key: str) -> Callable[[Loads], float | None]:
        return lambda found: found["steps"].numbers[key]

    names = {
        "schedule_us_mean": ("scheduler, a step of decodes, mean", "at most 1000"),
        "schedule_us_p50": ("scheduler, median", ""),
        "schedule_us_p99": ("scheduler, p99: all reach a block's end at once", ""),
        "step_us_mean": ("whole step of the core, no model, mean", ""),
        "step_us_p50": ("whole step, median", ""),
        "step_us_p99": ("whole step, p99", ""),
    }
    return [
        finding
        for key, (name, goal) in names.items()
        for finding in each_server(results, name, "µs", goal, number(key))
    ]


R1 = Scenario(
    "How close is the decoding of one stream to reading the weights at memory speed?",
    Plan("R1", (1,), tokens=128, prompt_tokens=128),
    ("tokens", "requests", "seconds", "prompt_tokens", "weights_bytes"),
    loads.sweep,
    find=_bandwidth_share,
    reference="128 tokens in, 512 out",
)
R7 = Scenario(
    "What does a step cost beside the model with 256 requests?",
    Plan("R7", (256,), tokens=200),
    ("streams", "tokens"),
    find=_scheduler,
    one=True,
)
FRONTEND = Scenario(
    "What do HTTP, the process border and this client cost against the engine's core alone?",
    Plan("frontend", (64,), tokens=64),
    ANSWERS,
    loads.throughput,
    find=_front_end,
)
_PEERS = {"R5": LLAMA_CPP, "R6": ()}
"""The peers of scenarios that not every peer supports: R5 needs JSON schemas, R6 needs Castor's metrics."""

SCENARIOS: dict[str, LocalScenario] = {
    **{name: LocalScenario(scenario, _PEERS.get(name, PEERS)) for name, scenario in running.SCENARIOS.items()},
    "R1": LocalScenario(R1, beside="memory_bandwidth.py"),
    "R7": LocalScenario(R7, peers=(), beside="scheduler_steps.py"),
    "frontend": LocalScenario(FRONTEND, peers=(), beside="bare_core.py"),
}

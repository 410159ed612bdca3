"""The scenarios by name: the load, the sizes, and the question that each answers.

R1 to R7 are the project's reference set. The sizes here suit two CPU cores and a small model; ``reference`` says which
ones the set has on a GPU, and every size can be set by an option.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from benchmarks.harness.contenders import LLAMA_CPP, PEERS
from server.bench import loads
from server.bench.results.findings import Finding, Loads, Results, number_of, quotient
from server.bench.session import Plan, Session

Find = Callable[[Results, Plan], list[Finding]]
TOKENS_PER_SECOND = "output_tokens_per_second"
MACHINE, BARE_CORE = "this machine", "bare core"
"""What stands for a server in measurements beside the servers."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """``load`` is put on each server in each round; ``beside`` names a program of benchmarks/ that runs beside them.

    ``sizes`` are the options that mean something to it; with ``one`` it takes one number of streams. ``peers`` can be
    measured too. ``longest`` gives the tokens of the longest prompt and answer together, ``spare`` how many requests
    come beside the streams.
    """

    question: str
    plan: Plan
    sizes: tuple[str, ...]
    load: Callable[[Session], Awaitable[None]] | None = None
    beside: str | None = None
    find: Find | None = None
    peers: tuple[str, ...] = PEERS
    one: bool = False
    spare: int = 0
    reference: str = ""
    longest: Callable[[Plan], int] = lambda plan: plan.prompt_tokens + plan.tokens

    def context(self, plan: Plan) -> int:
        """Tokens that a stream needs room for: words that are two tokens and the template included."""
        return -(-(self.longest(plan) * 3 // 2 + 128) // 256) * 256


def _each(results: Results, name: str, unit: str, goal: str, value: Callable[[Loads], float | None]) -> list[Finding]:
    """The finding for every server that has it."""
    servers = list(dict.fromkeys(m.server for m in results.measurements))
    spreads = [(server, results.each_round(server, value)) for server in servers]
    return [Finding(name, server, found, unit, goal) for server, found in spreads if found is not None]


def _between(name: str, unit: str, goal: str, number: str, above: str, below: str) -> Find:
    """How a number of one load compares with that of another on the same server in the same round."""

    def value(found: Loads) -> float | None:
        return quotient(number_of(found[above], number), number_of(found[below], number))

    return lambda results, _plan: _each(results, name, unit, goal, value)


def _bandwidth_share(results: Results, _plan: Plan) -> list[Finding]:
    load = loads.streams_name(1)

    def copy(number: int) -> float:
        return results.of(MACHINE, number)["bandwidth"].numbers["copy"]

    def share_of(server: str) -> Callable[[int], float | None]:
        def share(number: int) -> float | None:
            measured = results.of(server, number)[load]
            seconds = number_of(measured, "tpot_p50")
            return None if seconds is None else measured.numbers["weights_bytes"] / seconds / copy(number)

        return share

    findings = _each(results, "copy bandwidth", "GB/s", "", lambda found: found["bandwidth"].numbers["copy"] / 1e9)
    findings += _each(results, "read bandwidth", "GB/s", "", lambda found: found["bandwidth"].numbers["read"] / 1e9)
    for server in results.servers:
        value = results.over_rounds(share_of(server))
        if value is not None:
            goal = "0.75 of a GPU's datasheet" if server == "castor" else ""
            findings.append(Finding("weights are read at", server, value, "of copy bandwidth", goal))
    return findings


def _goodput(results: Results, plan: Plan) -> list[Finding]:
    def number(load: str, name: str) -> Callable[[Loads], float | None]:
        return lambda found: number_of(found[load], name)

    goal = f"TTFT at most {plan.limits.ttft:g} s, TPOT at most {plan.limits.tpot:g} s"
    findings = []
    for load in (f"{share:g} of saturation" for share in plan.shares):
        findings += _each(results, f"goodput at {load}", "requests/s", goal, number(load, "goodput"))
        findings += _each(results, f"kept both limits at {load}", "of the requests", "", number(load, "good_share"))
    return findings


def _constrained(results: Results, plan: Plan) -> list[Finding]:
    findings = []
    for streams in plan.streams:
        find = _between(
            f"schema against free text, {streams} streams",
            "of its tok/s",
            "at least 0.9 at 16",
            TOKENS_PER_SECOND,
            f"schema {streams}",
            f"free {streams}",
        )
        findings += find(results, plan)
    return findings


def _cancelling(results: Results, plan: Plan) -> list[Finding]:
    def blocks(found: Loads) -> float:
        return found["half cancelled"].numbers["kv_blocks_held"]

    def seconds(found: Loads) -> float:
        return found["half cancelled"].numbers["seconds_until_free"]

    others = _between("p99 ITL of the others", "of undisturbed", "1", "itl_p99", "half cancelled", "undisturbed")
    return [
        *_each(results, "KV blocks held afterwards", "blocks", "0", blocks),
        *_each(results, "all blocks free after", "s", "", seconds),
        *others(results, plan),
    ]


def _intrusion(results: Results, _plan: Plan) -> list[Finding]:
    def beside(found: Loads) -> float | None:
        numbers = found["intruded"].numbers
        return quotient(numbers["itl_p99_beside"], numbers["itl_p99_alone"])

    def overall(found: Loads) -> float | None:
        return quotient(number_of(found["intruded"], "itl_p99"), number_of(found["alone"], "itl_p99"))

    def noted(name: str) -> Callable[[Loads], float | None]:
        return lambda found: found["intruded"].numbers[name]

    return [
        *_each(results, "p99 ITL while the long prompt is computed", "of alone", "at most 3", beside),
        *_each(results, "p99 ITL of the whole load", "of alone", "", overall),
        *_each(results, "TTFT of the long prompt", "s", "", noted("intruder_ttft")),
        *_each(results, "its tokens", "tokens", "", noted("intruder_prompt_tokens")),
        *_each(results, "tokens of the others meanwhile", "tokens", "", noted("tokens_beside")),
    ]


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
    for load in map(loads.streams_name, plan.streams):
        findings += _each(results, f"output at {load}", "tok/s", "", bare(load))
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
    return [finding for key, (name, goal) in names.items() for finding in _each(results, name, "µs", goal, number(key))]


SWEEP = (1, 4, 16, 64)
ANSWERS = ("streams", "tokens", "requests", "seconds")
PROMPTS = (*ANSWERS, "prompt_tokens")

SCENARIOS: dict[str, Scenario] = {
    "throughput": Scenario(
        "How many tokens a second come out at how many streams, and how long do they take?",
        Plan("throughput", SWEEP, tokens=64),
        (*ANSWERS, "rates", "shares"),
        loads.throughput,
    ),
    "R1": Scenario(
        "How close is the decoding of one stream to reading the weights at memory speed?",
        Plan("R1", (1,), tokens=128, prompt_tokens=128),
        ("tokens", "requests", "seconds", "prompt_tokens", "weights_bytes"),
        loads.sweep,
        beside="memory_bandwidth.py",
        find=_bandwidth_share,
        reference="128 tokens in, 512 out",
    ),
    "R2": Scenario(
        "What does it give at each number of streams with prompts of a fixed length?",
        Plan("R2", (1, 8, 32), tokens=32, prompt_tokens=128),
        PROMPTS,
        loads.sweep,
        reference="streams 1, 8, 32, 64, 128, 256; 1024 tokens in, 128 out",
    ),
    "R3": Scenario(
        "How many requests a second keep their limits when they arrive at random?",
        Plan("R3", (16,), tokens=32, prompt_tokens=48, shares=(0.5, 0.8, 1.0)),
        (*PROMPTS, "shares"),
        loads.conversations,
        find=_goodput,
        one=True,
        reference="means of 202 tokens in and 179 out; hundreds of requests",
        longest=lambda plan: 4 * (plan.prompt_tokens + plan.tokens),
    ),
    "R4": Scenario(
        "How much faster are prompts of which nine in ten begin alike?",
        Plan("R4", (4,), tokens=8, prompt_tokens=512, requests=3),
        PROMPTS,
        loads.shared_prefix,
        find=_between("shared prefix", "× the requests/s", "", "requests_per_second", "shared", "apart"),
        one=True,
        reference="2,048 shared tokens",
    ),
    "R5": Scenario(
        "What does it cost to follow a JSON schema?",
        Plan("R5", (16, 64), tokens=64, requests=1),
        ANSWERS,
        loads.constrained,
        find=_constrained,
        peers=LLAMA_CPP,
        reference="64 streams",
    ),
    "R6": Scenario(
        "Do requests that are left give everything back, and do the others notice?",
        Plan("R6", (8,), tokens=64),
        ANSWERS,
        loads.cancelling,
        find=_cancelling,
        one=True,
        peers=(),
        reference="hundreds of streams",
    ),
    "R7": Scenario(
        "What does a step cost beside the model with 256 requests?",
        Plan("R7", (256,), tokens=200),
        ("streams", "tokens"),
        beside="scheduler_steps.py",
        find=_scheduler,
        one=True,
        peers=(),
    ),
    "frontend": Scenario(
        "What do HTTP, the process border and this client cost against the engine's core alone?",
        Plan("frontend", (64,), tokens=64),
        ANSWERS,
        loads.throughput,
        beside="bare_core.py",
        find=_front_end,
        peers=(),
    ),
    "prefix": Scenario(
        "How much sooner comes the first token when the prompt begins like one before?",
        Plan("prefix", (1,), tokens=8, prompt_tokens=1000, requests=3),
        ("tokens", "requests", "seconds", "prompt_tokens"),
        loads.repeated_prefix,
        find=_between("TTFT first / second", "×", "at least 5", "ttft_p50", "first", "second"),
    ),
    "intrusion": Scenario(
        "What do running streams notice of a very long prompt that arrives?",
        Plan("intrusion", (8,), tokens=192, prompt_tokens=4000, requests=1),
        PROMPTS,
        loads.intrusion,
        find=_intrusion,
        one=True,
        spare=1,
    ),
}

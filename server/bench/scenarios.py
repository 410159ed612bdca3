"""The scenarios for a running server, by name: the load, the sizes, and the question that each answers.

R2 to R6 are of the project's reference set. The sizes here suit two CPU cores and a small model; ``reference`` says
which ones the set has on a GPU, and every size can be set by an option.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from server.bench import loads
from server.bench.results.findings import Finding, Loads, Results, number_of, quotient
from server.bench.session import Plan, Session

Find = Callable[[Results, Plan], list[Finding]]
TOKENS_PER_SECOND = "output_tokens_per_second"


@dataclass(frozen=True, slots=True)
class Scenario:
    """``load`` is put on each server in each round; it is None where no server is measured.

    ``sizes`` are the options that have an effect; with ``one`` it takes one number of streams. ``find`` answers the
    question from the measurements. ``longest`` gives the tokens of the longest prompt and its answer together,
    ``spare`` the number of requests in addition to the streams.
    """

    question: str
    plan: Plan
    sizes: tuple[str, ...]
    load: Callable[[Session], Awaitable[None]] | None = None
    find: Find | None = None
    one: bool = False
    spare: int = 0
    reference: str = ""
    longest: Callable[[Plan], int] = lambda plan: plan.prompt_tokens + plan.tokens

    def context(self, plan: Plan) -> int:
        """Tokens that a stream needs room for: words that are two tokens and the template included."""
        return -(-(self.longest(plan) * 3 // 2 + 128) // 256) * 256


def each_server(
    results: Results, name: str, unit: str, goal: str, value: Callable[[Loads], float | None]
) -> list[Finding]:
    """The finding for every server that has it."""
    servers = list(dict.fromkeys(m.server for m in results.measurements))
    spreads = [(server, results.each_round(server, value)) for server in servers]
    return [Finding(name, server, found, unit, goal) for server, found in spreads if found is not None]


def _between(name: str, unit: str, goal: str, number: str, above: str, below: str) -> Find:
    """How a number of one load compares with that of another on the same server in the same round."""

    def value(found: Loads) -> float | None:
        return quotient(number_of(found[above], number), number_of(found[below], number))

    return lambda results, _plan: each_server(results, name, unit, goal, value)


def _goodput(results: Results, plan: Plan) -> list[Finding]:
    def number(load: str, name: str) -> Callable[[Loads], float | None]:
        return lambda found: number_of(found[load], name)

    goal = f"TTFT at most {plan.limits.ttft:g} s, TPOT at most {plan.limits.tpot:g} s"
    findings = []
    for load in (f"{fraction:g} of saturation" for fraction in plan.shares):
        findings += each_server(results, f"goodput at {load}", "requests/s", goal, number(load, "goodput"))
        findings += each_server(
            results, f"kept both limits at {load}", "of the requests", "", number(load, "good_share")
        )
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
        *each_server(results, "KV blocks held afterwards", "blocks", "0", blocks),
        *each_server(results, "all blocks free after", "s", "", seconds),
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
        *each_server(results, "p99 ITL while the long prompt is computed", "of alone", "at most 3", beside),
        *each_server(results, "p99 ITL of the whole load", "of alone", "", overall),
        *each_server(results, "TTFT of the long prompt", "s", "", noted("intruder_ttft")),
        *each_server(results, "its tokens", "tokens", "", noted("intruder_prompt_tokens")),
        *each_server(results, "tokens of the others meanwhile", "tokens", "", noted("tokens_beside")),
    ]


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
        reference="64 streams",
    ),
    "R6": Scenario(
        "Do requests that are left give everything back, and do the others notice?",
        Plan("R6", (8,), tokens=64),
        ANSWERS,
        loads.cancelling,
        find=_cancelling,
        one=True,
        reference="hundreds of streams",
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

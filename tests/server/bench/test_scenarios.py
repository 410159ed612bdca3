"""The scenarios: what each puts on a server, in small."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.sse_server import gemini_event, sse_server

from server.bench.load import Target
from server.bench.loads import gaps_between
from server.bench.prompts import Prompts
from server.bench.scenarios import SCENARIOS
from server.bench.session import Measurement, Plan, Session, metric_samples
from server.bench.wire.counting import Outcome
from server.bench.wire.protocols import Gemini
from server.config.errors import ConfigError

ANSWER = (gemini_event("a", 1), 0.01, gemini_event("b", 2, "STOP"))
LOADS = {
    "throughput": ["1 stream", "2 streams", "30 a second", "0.5 of most"],
    "R2": ["1 stream", "2 streams"],
    "R3": ["saturation", "0.5 of saturation"],
    "R4": ["apart", "shared"],
    "R5": ["free 1", "schema 1", "free 2", "schema 2"],
    "prefix": ["first", "second"],
    "intrusion": ["alone", "intruded"],
}


def small(name: str) -> Plan:
    sizes = {"streams": (1, 2), "prompt_tokens": 4, "requests": 1, "seconds": 0, "shares": (0.5,), "rates": (30.0,)}
    return replace(SCENARIOS[name].plan, **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LOADS)
async def test_loads_of(name: str) -> None:
    load = SCENARIOS[name].load
    assert load is not None
    told: list[Measurement] = []
    async with sse_server(ANSWER) as server:
        target = Target("castor", server.url, Gemini(), "m")
        session = Session(target, small(name), Prompts(0), 0, told.append)
        await session.warm_up()
        await load(session)
        bodies = server.bodies
    assert [measurement.name for measurement in told] == LOADS[name]
    assert all(m.summary is not None and m.summary.errors == 0 for m in told)
    assert len(set(bodies)) == len(bodies), "a prompt was sent twice"


async def test_a_server_that_refuses_everything_ends_the_run() -> None:
    async with sse_server((b"queue full",), status="429 Too Many Requests") as server:
        session = Session(Target("castor", server.url, Gemini(), "m"), small("R2"), Prompts(0), 0, lambda _: None)
        with pytest.raises(ConfigError, match="HTTP 429: queue full"):
            await session.warm_up()
        with pytest.raises(ConfigError, match="every request of the load 'some'"):
            await session.closed("some", session.prompts.stories(2, 4), 2)


def test_every_scenario_says_what_it_asks() -> None:
    assert list(SCENARIOS) == [
        *("throughput", "R2", "R3", "R4", "R5", "R6", "prefix", "intrusion"),
    ]
    for name, scenario in SCENARIOS.items():
        assert scenario.plan.scenario == name
        assert scenario.question.endswith("?")
        assert scenario.load
        assert scenario.context(scenario.plan) % 256 == 0
        assert scenario.context(scenario.plan) > scenario.plan.prompt_tokens + scenario.plan.tokens


def test_prompts_are_the_same_for_everybody_and_never_repeat() -> None:
    def drawn() -> list[str]:
        prompts = Prompts(3)
        calls = [*prompts.stories(5, 8), *prompts.words(5, 20, 8), *prompts.conversations(50, 30, 20)]
        assert all(1 <= call.max_tokens <= 80 for call in calls)
        return [call.prompt for call in calls]

    assert drawn() == drawn()
    assert len(set(drawn())) == 60
    assert Prompts(0).stories(1, 8)[0].prompt == "Tell me a story about the number 1 and a dragon."


def test_metrics_are_summed_over_their_samples() -> None:
    text = '# HELP a_b Words.\na_b{model="x"} 2.0\na_b{model="y"} 3.0\na_b_total 9\n'
    assert metric_samples(text, "a_b") == [2.0, 3.0]
    assert metric_samples(text, "missing") == []
    assert metric_samples("a_b is what?", "a_b is") == []


async def test_a_load_lasts_as_long_as_the_plan_wants() -> None:
    async with sse_server((0.02, *ANSWER)) as server:

        async def requests(seconds: float, streams: int = 2) -> int:
            plan = replace(small("R2"), seconds=seconds)
            session = Session(Target("castor", server.url, Gemini(), "m"), plan, Prompts(0), 0, lambda _: None)
            measured = await session.closed("some", session.prompts.stories(plan.most(streams), 4), streams)
            assert measured.summary is not None
            return measured.summary.requests

        assert await requests(0.0) == 16
        assert 16 < await requests(0.6) < 160
        assert await requests(60.0, streams=16) == 160, "what was drawn for all servers is the most"


async def test_arrivals_last_as_long_as_the_plan_wants() -> None:
    async with sse_server(ANSWER) as server:
        plan = replace(small("R3"), seconds=0.5)
        session = Session(Target("castor", server.url, Gemini(), "m"), plan, Prompts(0), 0, lambda _: None)
        for rate, requests in ((80.0, 40), (40.0, 20), (30.0, 16), (1000.0, 160)):
            measured = await session.open("some", session.prompts.stories(plan.most(2), 4), rate)
            assert measured.summary is not None
            assert measured.summary.requests == requests


async def test_a_server_that_does_not_tell_its_metrics() -> None:
    async with sse_server(ANSWER) as server:
        gone = server.url
    session = Session(Target("castor", gone, Gemini(), "m"), small("R6"), Prompts(0), 0, lambda _: None)
    with pytest.raises(ConfigError, match="castor does not answer at /metrics"):
        await session.metric("a_b")


def test_gaps_that_overlap_an_interval() -> None:
    outcome = Outcome(0.0, first=1.0, gaps=[(1.0, 1), (1.0, 2), (1.0, 1)])
    assert gaps_between([outcome], 2.5, 2.9) == [0.5, 0.5]
    assert gaps_between([outcome], 1.5, 2.5) == [1.0, 0.5, 0.5]
    assert gaps_between([outcome], 9.0, 10.0) == []

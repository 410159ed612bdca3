"""Options to a plan, or the one sentence that says what is wrong with them."""

from __future__ import annotations

import pytest

from server.bench.options import Options
from server.bench.plans import plan_of
from server.bench.results.measure import Limits
from server.bench.scenarios import SCENARIOS
from server.config.errors import ConfigError


def test_sizes_of_options_replace_those_of_the_scenario() -> None:
    given = Options(scenario="R2", streams=[3], tokens=5, rounds=1, ttft_limit=9.0)
    made = plan_of(given, SCENARIOS["R2"], default_seed=7)
    assert (made.streams, made.tokens, made.rounds, made.prompt_tokens, made.seed) == ((3,), 5, 1, 128, 7)
    assert made.limits == Limits(9.0, 0.2)
    assert plan_of(Options(seed=0), SCENARIOS["throughput"], default_seed=7).seed == 0
    assert plan_of(Options(rates=[], shares=[0.5]), SCENARIOS["throughput"], 0).shares == (0.5,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"scenario": "R2", "rates": [1.0]},
            "--rate has no effect on the scenario R2, which takes --streams, --tokens, --requests, --seconds, --p",
        ),
        ({"weights_bytes": 5}, "--weights-bytes has no effect on the scenario throughput, which takes --streams"),
        ({"scenario": "R6", "streams": [1, 2]}, "--streams is given 2 times, but the scenario R6 takes it once"),
        ({"seed": -1}, "--seed is -1"),
        ({"rates": [float("nan")]}, "--rate is nan"),
        ({"streams": [4, 0]}, "--streams is 0, but must be at least 1"),
        ({"rounds": 0}, "--rounds is 0"),
        ({"shares": [0.0]}, "--share is 0, but must be at least 0.001"),
    ],
)
def test_sizes_that_cannot_be_measured(options: dict[str, object], words: str) -> None:
    given = Options(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as raised:
        plan_of(given, SCENARIOS[given.scenario], default_seed=0)
    assert words in str(raised.value)

"""Turns options into a plan, or raises one sentence that says what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from server.bench.options import Options
from server.bench.results.measure import Limits
from server.bench.scenarios import Scenario
from server.bench.session import Plan
from server.config.errors import ConfigError

MINIMUM = {"seed": 0, "seconds": 0, "prompt_tokens": 0, "rates": 0.001, "shares": 0.001}
"""The smallest value of each size; 1 for those that are not listed."""


def plan_of(options: Options, scenario: Scenario, default_seed: int) -> Plan:
    """The scenario's sizes, replaced by those that were given. Raises ``ConfigError`` naming option and limit."""
    sizes: dict[str, Any] = {
        "streams": options.streams and tuple(options.streams),
        "tokens": options.tokens,
        "prompt_tokens": options.prompt_tokens,
        "requests": options.requests,
        "seconds": options.seconds,
        "rates": options.rates and tuple(options.rates),
        "shares": options.shares and tuple(options.shares),
        "weights_bytes": options.weights_bytes,
    }
    given = {name: value for name, value in sizes.items() if value not in (None, [])}
    seed = default_seed if options.seed is None else options.seed
    for name, value in (given | {"rounds": options.rounds, "seed": seed}).items():
        numbers: Sequence[float] = value if isinstance(value, tuple) else (value,)
        minimum = MINIMUM.get(name, 1)
        if not min(numbers) >= minimum:  # so that NaN is refused as well
            raise ConfigError(f"{_option(name)} is {min(numbers):g}, but must be at least {minimum:g}")
    for name in given:
        if name not in scenario.sizes:
            known = ", ".join(map(_option, scenario.sizes))
            raise ConfigError(f"{_option(name)} has no effect on the scenario {options.scenario}, which takes {known}")
    number = len(given.get("streams", ()))
    if scenario.one and number > 1:
        raise ConfigError(f"--streams is given {number} times, but the scenario {options.scenario} takes it once")
    limits = Limits(options.ttft_limit, options.tpot_limit)
    return replace(scenario.plan, rounds=options.rounds, limits=limits, seed=seed, **given)


def _option(size: str) -> str:
    """A size as it is written on the command line."""
    return "--" + {"rates": "rate", "shares": "share"}.get(size, size).replace("_", "-")

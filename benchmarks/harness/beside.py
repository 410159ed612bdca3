"""Measurements without a server: programs of benchmarks/ that may import torch, each in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.contenders import PROGRAMS
from benchmarks.harness.programs import output_of
from benchmarks.harness.scenarios import BARE_CORE, MACHINE
from engine.api.engine import EngineConfig
from server.bench.loads import streams_name
from server.bench.prompts import Prompts
from server.bench.session import WARM_UP_TOKENS, Measurement, Plan
from server.config.errors import ConfigError

PROGRAM_SECONDS = 1800


@dataclass(frozen=True, slots=True)
class Beside:
    """The input of the programs: the engine's configuration, the plan, and prompts like those of the servers."""

    config: EngineConfig
    plan: Plan
    prompts: Prompts

    def run(self, program: str, number: int) -> list[Measurement]:
        """Run a program in a round, while no server runs. Raises ``ConfigError`` if it fails."""
        return PROGRAM_RUNS[program](self, program, number)


def _bandwidth(beside: Beside, program: str, number: int) -> list[Measurement]:
    numbers = _numbers(program, {"threads": beside.config.threads})
    return [Measurement(MACHINE, number, "bandwidth", numbers=numbers)]


def _scheduler(beside: Beside, program: str, number: int) -> list[Measurement]:
    plan = beside.plan
    numbers = _numbers(program, {"folder": beside.config.path, "requests": plan.most_streams, "steps": plan.tokens})
    return [Measurement("castor", number, "steps", numbers=numbers)]


def _bare_core(beside: Beside, program: str, number: int) -> list[Measurement]:
    plan, prompts = beside.plan, beside.prompts
    warm_up = [call.prompt for streams in plan.streams for call in prompts.stories(streams, WARM_UP_TOKENS)]
    found = []
    for streams in plan.streams:
        calls = prompts.stories(plan.most(streams), plan.tokens)
        task = {
            "config": asdict(beside.config),
            "warm_up": warm_up,
            "warm_up_tokens": WARM_UP_TOKENS,
            "prompts": [call.prompt for call in calls],
            "streams": streams,
            "tokens": plan.tokens,
            "least": plan.least(streams),
            "seconds": plan.seconds,
        }
        numbers = _numbers(program, task)
        if numbers["failed"]:
            raise ConfigError(f"the bare core failed {numbers['failed']:g} requests with {streams_name(streams)}")
        found.append(Measurement(BARE_CORE, number, streams_name(streams), numbers=numbers))
    return found


PROGRAM_RUNS: dict[str, Callable[[Beside, str, int], list[Measurement]]] = {
    "memory_bandwidth.py": _bandwidth,
    "scheduler_steps.py": _scheduler,
    "bare_core.py": _bare_core,
}


def _numbers(program: str, task: dict[str, Any]) -> dict[str, float]:
    """The program's answer: the last line of its standard output is one object of numbers. Raises ``ConfigError``."""
    path = PROGRAMS / program
    if not path.is_file():
        raise ConfigError(f"this scenario needs {program} of Castor's checkout: run ./scripts/bench there")
    said = output_of(Path(program).stem, [sys.executable, str(path)], json.dumps(task), PROGRAM_SECONDS)
    return last_numbers(Path(program).stem, said)


def last_numbers(name: str, said: str) -> dict[str, float]:
    """The object in the last line of a program's output. Raises ``ConfigError`` if it contains anything but numbers."""
    *_, line = said.strip().splitlines() or [""]
    try:
        numbers = {str(key): float(value) for key, value in json.loads(line).items()}
    except (ValueError, TypeError, AttributeError):
        raise ConfigError(f"{name} did not end with a line of numbers, but with {line[:200]!r}") from None
    return numbers

"""``castor bench``: measures a running server, or, without a URL, Castor itself and its peers in turn."""

from __future__ import annotations

import asyncio
import json
import os
import random
import ssl
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.beside import Beside
from benchmarks.harness.contenders import PEERS, Contender, castor, peer, versions
from benchmarks.harness.programs import ROOT
from server.bench.environment import describe
from server.bench.load import Target
from server.bench.prompts import Prompts
from server.bench.results import plots, report
from server.bench.results.findings import Results
from server.bench.results.measure import Limits
from server.bench.rounds import Tell, measure_own, measure_running
from server.bench.scenarios import SCENARIOS, Scenario
from server.bench.session import Measurement, Plan
from server.bench.wire.client import HttpError, get, parse_url
from server.bench.wire.protocols import Gemini
from server.commands.models import models_file
from server.commands.terminal import console
from server.config.errors import ConfigError
from server.config.models_file import ModelSpec, load_specs
from server.config.settings import Settings, is_loopback
from server.models.registry import engine_config

PLOTS_MISSING = "no plots: matplotlib is not installed; for them run: pip install 'castor-serve[bench]'"
MODELS_PATH = "/v1beta/models"
CONNECT_SECONDS = 30.0
LEAST = {"seed": 0, "seconds": 0, "prompt_tokens": 0, "rates": 0.001, "shares": 0.001}
"""The least of each size; of those that are not here 1."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the operator asked for; None and empty tuples leave a size to the scenario."""

    url: str | None = None
    model: str | None = None
    api_key: str | None = None
    scenario: str = "throughput"
    peers: tuple[str, ...] = ()
    streams: tuple[int, ...] = ()
    rounds: int = 3
    requests: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    prompt_tokens: int | None = None
    rates: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    ttft_limit: float = 2.0
    tpot_limit: float = 0.2
    weights_bytes: int | None = None
    seed: int | None = None
    output: Path = Path("benchmarks")


def bench(options: Options, settings: Settings) -> int:
    """Measure, print, and leave the JSON and the plots in the folder. Raises ``ConfigError``."""
    scenario = scenario_of(options)
    plan = plan_of(options, scenario)
    check_folder(options.output)
    terminal = console()
    terminal.print(f"{plan.scenario}: {scenario.question}", soft_wrap=True)
    measurements: list[Measurement] = []

    def tell(measurement: Measurement) -> None:
        measurements.append(measurement)
        terminal.print(_line(measurement), soft_wrap=True)

    environment, measure = _prepared(options, scenario, plan, settings, tell)
    for name, build in environment.get("builds", {}).items():
        terminal.print(machine.told(name, build), soft_wrap=True)
    content = report.Content(scenario, plan, environment)
    try:
        measure()
        results = Results(measurements)
        findings = scenario.find(results, plan) if scenario.find else []
        path = report.write(content.document(results, findings), options.output)
    except BaseException as failure:
        if measurements:  # an hour of measuring is not thrown away for whatever failed after it
            path = report.write(content.document(Results(measurements), [], incomplete=repr(failure)), options.output)
            terminal.print(f"incomplete; what was measured until then: {path}", soft_wrap=True)
        raise
    report.show(results, findings, _output())
    terminal.print(f"all numbers: {path}", soft_wrap=True)
    _plot(results, plan, path, terminal.print)
    return 0


def scenario_of(options: Options) -> Scenario:
    """The scenario that is named. Raises ``ConfigError`` where the options cannot go with it."""
    scenario = SCENARIOS.get(options.scenario)
    if scenario is None:
        raise ConfigError(f"the scenario {options.scenario!r} is unknown; there are {', '.join(SCENARIOS)}")
    if options.url is not None and options.peers:
        raise ConfigError("peers are started beside a Castor of our own: leave out either the URL or --peer")
    if options.url is not None and scenario.beside is not None:
        raise ConfigError(
            f"the scenario {options.scenario} measures this machine beside the server: run it without a URL, "
            f"./scripts/bench --scenario {options.scenario}"
        )
    for name in options.peers:
        if name in PEERS and name not in scenario.peers:
            reason = f"takes {', '.join(scenario.peers)} as peers" if scenario.peers else "looks into Castor itself"
            raise ConfigError(f"the scenario {options.scenario} {reason}: leave out --peer {name}")
    return scenario


def plan_of(options: Options, scenario: Scenario) -> Plan:
    """The scenario's sizes with those of the options in their place. Raises ``ConfigError`` naming option and limit."""
    sizes: dict[str, Any] = {
        "streams": options.streams or None,
        "tokens": options.tokens,
        "prompt_tokens": options.prompt_tokens,
        "requests": options.requests,
        "seconds": options.seconds,
        "rates": options.rates or None,
        "shares": options.shares or None,
        "weights_bytes": options.weights_bytes,
    }
    given = {name: value for name, value in sizes.items() if value is not None}
    _check_sizes(options, scenario, given)
    # A server that was measured before remembers its prompts; one of our own is new.
    seed = options.seed if options.seed is not None else random.randrange(10_000) if options.url else 0
    limits = Limits(options.ttft_limit, options.tpot_limit)
    return replace(scenario.plan, rounds=options.rounds, limits=limits, seed=seed, **given)


def _check_sizes(options: Options, scenario: Scenario, given: dict[str, Any]) -> None:
    for name, value in (given | {"rounds": options.rounds, "seed": options.seed or 0}).items():
        numbers: Sequence[float] = value if isinstance(value, tuple) else (value,)
        least = LEAST.get(name, 1)
        if not min(numbers) >= least:
            raise ConfigError(f"{_option(name)} is {min(numbers):g}, but must be at least {least:g}")
    for name in given:
        if name not in scenario.sizes:
            known = ", ".join(map(_option, scenario.sizes))
            raise ConfigError(f"{_option(name)} has no effect on the scenario {options.scenario}, which takes {known}")
    if scenario.one and len(options.streams) > 1:
        number = len(options.streams)
        raise ConfigError(f"--streams is given {number} times, but the scenario {options.scenario} takes it once")


def _option(size: str) -> str:
    """A size as it is written on the command line."""
    return "--" + {"rates": "rate", "shares": "share"}.get(size, size).replace("_", "-")


def check_folder(folder: Path) -> None:
    """Make the folder for the results before anything is measured. Raises ``ConfigError`` if nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise ConfigError(f"the output folder {folder} cannot be made: {reason}; name another: --output") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"the output folder {folder} cannot be written to; name another: --output")


async def running_target(options: Options, text: str, own_key: str | None = None) -> Target:
    """The server at a URL and the model that is asked: the named one, or the first that it lists.

    ``own_key`` is for a server of this machine: nobody else gets a key that was not named for him.
    """
    url, dialect = parse_url(text), Gemini()
    key = options.api_key or (own_key if is_loopback(url.host) else None)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            status, body = await get(url, MODELS_PATH, dialect.headers(key))
    except TimeoutError:
        raise ConfigError(f"no server answers at {url} within {CONNECT_SECONDS:.0f} s; is it overloaded?") from None
    except ssl.SSLError as error:  # an OSError, but its number is none of the system's
        raise ConfigError(f"no TLS with {url}: {tls_reason(error)}") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise ConfigError(f"no server answers at {url}: {reason}; start one: castor serve") from None
    except HttpError as error:
        raise ConfigError(f"no server answers at {url}: {error}") from None
    target = Target("server", url, dialect, options.model or "", key)
    if options.model:
        return target
    names = _model_names(body) if status == 200 else []
    if not names:
        said = body.decode(errors="replace").replace("\n", " ")[:200]
        raise ConfigError(
            f"{url} lists no models, but answers HTTP {status}: {said}; name one with --model, a key with --api-key"
        )
    return replace(target, model=names[0])


def tls_reason(error: ssl.SSLError) -> str:
    """What is wrong with a certificate, or else why there is no TLS, in OpenSSL's words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    reason = (error.reason or str(error)).lower().replace("_", " ")
    return f"{reason}; does it speak http:// instead?" if "wrong version" in reason else reason


def _prepared(
    options: Options, scenario: Scenario, plan: Plan, settings: Settings, tell: Tell
) -> tuple[dict[str, Any], Callable[[], None]]:
    """The environment, and what measures in it."""
    if options.url is not None:
        target = asyncio.run(running_target(options, options.url, next(iter(settings.api_keys), None)))
        return describe(["castor", *sys.argv[1:]], {}, ROOT), lambda: measure_running(scenario, plan, target, tell)
    models = models_file(settings)
    spec = _spec(load_specs(models), options.model, models)
    choice = machine.choice_of(spec)
    ours = castor(spec, settings, models)
    peers = [peer(name, spec, settings, choice) for name in dict.fromkeys(options.peers)]
    contenders: list[Contender] = [ours, *peers]
    found = {contender.name: versions(contender.python, contender.packages) for contender in contenders}
    beside = Beside(engine_config(spec, ours.weights, settings.cache_dir), plan, Prompts(plan.seed))
    builds = {contender.name: contender.build for contender in contenders if contender.build}
    environment = describe(["castor", *sys.argv[1:]], found, ROOT) | asdict(choice) | {"builds": builds}
    return environment, lambda: measure_own(scenario, plan, contenders, beside, choice.threads, tell)


def _spec(specs: list[ModelSpec], name: str | None, models: Path) -> ModelSpec:
    for spec in specs:
        if name in (None, spec.name):
            return spec
    raise ConfigError(f"no model is named {name!r}; {models} has {', '.join(spec.name for spec in specs)}")


def _model_names(body: bytes) -> list[str]:
    try:
        return [str(model["name"]).removeprefix("models/") for model in json.loads(body)["models"]]
    except (ValueError, LookupError, TypeError):
        return []


def _line(measurement: Measurement) -> str:
    start = f"round {measurement.round + 1}, {measurement.server}, {measurement.name}"
    if measurement.summary is None:
        return f"{start}: " + ", ".join(f"{name} {value:.4g}" for name, value in measurement.numbers.items())
    summary = measurement.summary
    failed = f", {summary.errors} of {summary.requests} failed" if summary.errors else ""
    return f"{start}: {summary.output_tokens_per_second:.1f} tok/s in {summary.seconds:.1f} s{failed}"


def _plot(results: Results, plan: Plan, path: Path, say: Any) -> None:
    if not results.loads:
        return
    if not plots.can_plot():
        say(PLOTS_MISSING, soft_wrap=True)
        return
    picture = path.with_suffix(".png")
    plots.plot(results, f"{plan.scenario}: {plan.tokens} tokens, rounds: {plan.rounds}", picture)
    say(f"plots: {picture}", soft_wrap=True)


def _output() -> Any:
    from rich.console import Console

    output = Console(highlight=False, markup=False, emoji=False)
    return output if output.is_terminal else Console(highlight=False, markup=False, emoji=False, width=140)

"""``./scripts/bench``: starts Castor and its peers in turn on this machine, measures and compares them."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.harness import machine
from benchmarks.harness.beside import Beside
from benchmarks.harness.contenders import PEERS, Contender, castor, peer, versions
from benchmarks.harness.programs import ROOT
from benchmarks.harness.rounds import measure_own
from benchmarks.harness.scenarios import SCENARIOS, LocalScenario
from server.bench import options
from server.bench.environment import describe
from server.bench.plans import plan_of
from server.bench.prompts import Prompts
from server.bench.results.report import ReportContent
from server.bench.run import check_folder, run
from server.cli import CacheDir, ModelsFile
from server.commands.models import models_file
from server.commands.terminal import console
from server.config.errors import ConfigError
from server.config.models_file import load_specs
from server.config.settings import Settings
from server.models.registry import engine_config

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessOptions(options.Options):
    """The options of a run that starts its own servers."""

    peers: tuple[str, ...] = ()


def compare(given: HarnessOptions, settings: Settings) -> None:
    """Start, measure, print, and write the JSON and the plots into the folder. Raises ``ConfigError``."""
    local = scenario_of(given)
    scenario, plan = local.scenario, plan_of(given, local.scenario, default_seed=0)
    check_folder(given.output)
    terminal = console()
    terminal.print(f"{plan.scenario}: {scenario.question}", soft_wrap=True)
    models = models_file(settings)
    specs = {spec.name: spec for spec in load_specs(models)}
    spec = specs.get(given.model or next(iter(specs)))
    if spec is None:
        raise ConfigError(f"no model is named {given.model!r}; {models} has {', '.join(specs)}")
    choice = machine.choice_of(spec)
    ours = castor(spec, settings, models)
    contenders: list[Contender] = [ours, *(peer(name, spec, settings, choice) for name in dict.fromkeys(given.peers))]
    found = {contender.name: versions(contender.python, contender.packages) for contender in contenders}
    builds = {contender.name: contender.build for contender in contenders if contender.build}
    environment = describe(["scripts/bench", *sys.argv[1:]], found, ROOT) | asdict(choice) | {"builds": builds}
    for name, build in builds.items():
        terminal.print(machine.build_in_words(name, build), soft_wrap=True)
    beside = Beside(engine_config(spec, ours.weights, settings.cache_dir), plan, Prompts(plan.seed))
    run(
        ReportContent(scenario, plan, environment),
        lambda note: measure_own(local, plan, contenders, beside, choice.threads, note),
        given.output,
        terminal,
    )


def scenario_of(given: HarnessOptions) -> LocalScenario:
    """The named scenario. Raises ``ConfigError`` if there is none, or if a peer cannot take part in it."""
    local = SCENARIOS.get(given.scenario)
    if local is None:
        raise ConfigError(f"the scenario {given.scenario!r} is unknown; there are {', '.join(SCENARIOS)}")
    for name in given.peers:
        if name in PEERS and name not in local.peers:
            reason = f"takes {', '.join(local.peers)} as peers" if local.peers else "measures Castor alone"
            raise ConfigError(f"the scenario {given.scenario} {reason}: leave out --peer {name}")
    return local


@app.command()
def main(
    model: options.ModelName = None,
    scenario: Annotated[str, typer.Option(help="throughput, R1 to R7, frontend, prefix or intrusion.")] = "throughput",
    peers: Annotated[
        list[str] | None, typer.Option("--peer", help="llama.cpp, llama.cpp-native, transformers; repeatable.")
    ] = None,
    streams: options.Streams = None,
    rounds: Annotated[int, typer.Option(help="Number of rounds; in each, every server is started and measured.")] = 3,
    requests: options.Requests = None,
    seconds: options.Seconds = None,
    tokens: options.Tokens = None,
    prompt_tokens: options.PromptTokens = None,
    rates: options.Rates = None,
    shares: options.Shares = None,
    ttft_limit: options.TtftLimit = 2.0,
    tpot_limit: options.TpotLimit = 0.2,
    weights_bytes: Annotated[int | None, typer.Option(help="Bytes of weights that Castor reads for a token.")] = None,
    seed: options.Seed = None,
    output: options.Output = Path("benchmarks"),
    models: ModelsFile = None,
    cache_dir: CacheDir = None,
) -> None:
    """Start Castor and its peers in turn on this machine, measure and compare them.

    With a URL, ./scripts/bench measures that running server and takes the options of `castor bench`.
    """
    given = HarnessOptions(
        model=model,
        scenario=scenario,
        peers=tuple(peers or ()),
        streams=streams,
        rounds=rounds,
        requests=requests,
        seconds=seconds,
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        rates=rates,
        shares=shares,
        ttft_limit=ttft_limit,
        tpot_limit=tpot_limit,
        weights_bytes=weights_bytes,
        seed=seed,
        output=output,
    )
    compare(given, Settings.from_env(os.environ, models=models, cache_dir=cache_dir))

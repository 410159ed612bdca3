"""The options of a run as they are written on a command line. ``castor`` imports them for every command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

Whole = int | None
Number = float | None

ModelName = Annotated[str | None, typer.Option(help="Name of the model; the first one unless given.")]
Streams = Annotated[list[int] | None, typer.Option("--streams", help="Concurrent requests; repeatable.")]
Requests = Annotated[Whole, typer.Option(help="Minimum requests per stream; at least 16 in all.")]
Seconds = Annotated[Number, typer.Option(help="Minimum duration of a load in seconds.")]
Tokens = Annotated[Whole, typer.Option(help="Maximum tokens of an answer.")]
PromptTokens = Annotated[Whole, typer.Option(help="Approximate length of a prompt in tokens.")]
Rates = Annotated[list[float] | None, typer.Option("--rate", help="Poisson arrivals per second; repeatable.")]
Shares = Annotated[
    list[float] | None,
    typer.Option("--share", help="Arrival rate as a share of the measured maximum; repeatable."),
]
TtftLimit = Annotated[float, typer.Option(help="Longest time to first token that counts as goodput, in seconds.")]
TpotLimit = Annotated[float, typer.Option(help="Longest time per further token that counts as goodput, in seconds.")]
Seed = Annotated[Whole, typer.Option(help="Seed of the prompts and arrivals.")]
Output = Annotated[Path, typer.Option(help="Folder for the JSON and the plots.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of every run. None leaves a size to the scenario; only the harness sets ``weights_bytes``."""

    model: str | None = None
    scenario: str = "throughput"
    streams: list[int] | None = None
    rounds: int = 3
    requests: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    prompt_tokens: int | None = None
    rates: list[float] | None = None
    shares: list[float] | None = None
    ttft_limit: float = 2.0
    tpot_limit: float = 0.2
    weights_bytes: int | None = None
    seed: int | None = None
    output: Path = Path("benchmarks")

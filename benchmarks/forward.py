"""The forward of the built-in model alone, without sampling or HTTP: chunks of a long prompt, and steps of decode.

    .venv/bin/python benchmarks/forward.py [--threads 2] [--rounds 5] [--target="-mavx2 -mfma -mf16c" ...] [--torch]

Each target is the C code compiled with these options, as a wheel ships it, say; ``--torch`` adds transformers' own
modules over the paged cache. All variants take turns. Prints milliseconds, medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from engine.api.engine import EngineConfig
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.build import build_runner, load_tokenizer
from engine.native.compiled import machine_code
from engine.scheduling.contracts import Runner
from engine.scheduling.sequence import ScheduledChunk, Sequence
from engine.weights.sources import parse_source, prepare
from server.config.models_file import load_specs
from server.config.settings import Settings

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Step:
    """``sequences`` sequences with ``start`` tokens each, for which ``new`` more are computed."""

    name: str
    sequences: int
    start: int
    new: int


STEPS = (
    Step("prefill, 256 tokens", 1, 0, 256),
    Step("prefill, 256 after 3,840", 1, 3840, 256),
    Step("prefill, 8 after 3,840", 1, 3840, 8),
    Step("decode, 1 after 64", 1, 64, 1),
    Step("decode, 1 after 3,840", 1, 3840, 1),
    Step("decode, 16 after 64", 16, 64, 1),
    Step("decode, 16 after 1,000", 16, 1000, 1),
)


def main() -> None:
    """Measure all variants in turn, round after round."""
    parser = argparse.ArgumentParser(description="Time the forward of the built-in model.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--target", action="append", default=[])
    parser.add_argument("--torch", action="store_true")
    options = parser.parse_args()
    ways = {target: native(target, options.threads) for target in options.target or machine_code.TARGETS[0]}
    if options.torch:
        ways["torch"] = runner_of(EngineConfig(str(folder()), native=False, threads=options.threads))
    found: dict[tuple[str, Step], list[float]] = {(way, step): [] for step in STEPS for way in ways}
    for _ in range(options.rounds):
        for way, step in found:
            # The C code leaves one thread to torch; torch alone gets them all.
            torch.set_num_threads(options.threads if way == "torch" else 1)
            found[way, step].append(1e3 * seconds_of(ways[way], step))
    print(f"{'ms':<28}" + "".join(f"{way:>20}" for way in ways))
    for step in STEPS:
        print(f"{step.name:<28}" + "".join(f"{median(found[way, step]):>20.2f}" for way in ways))


def folder() -> Path:
    spec = load_specs(ROOT / "models.yaml")[0]
    return prepare(parse_source(spec.source), spec.sha256, Settings.from_env(os.environ).cache_dir, quiet)


def native(target: str, threads: int) -> Runner:
    machine_code.TARGETS = (tuple(shlex.split(target)),)
    return runner_of(EngineConfig(str(folder()), threads=threads))


def runner_of(config: EngineConfig) -> Runner:
    return build_runner(config, quiet, load_tokenizer(Path(config.path)))


def quiet(stage: str, fraction: float) -> None:
    """Ignore the progress."""


def seconds_of(runner: Runner, step: Step) -> float:
    """The fastest of three."""
    pages = -(-(step.start + step.new) // runner.info.block_size)
    chunks = []
    for number in range(step.sequences):
        ids = [(7919 * place) % 40_000 + 100 for place in range(step.start + step.new)]
        sequence = Sequence(Request(str(number), (), SamplingParams(1)), 0, ids)
        sequence.blocks = list(range(number * pages, (number + 1) * pages))
        chunks.append(ScheduledChunk(sequence, step.start, step.new))
    assert step.sequences * pages <= runner.info.groups[0].num_blocks, "the cache is too small"
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        runner.forward(chunks)
        taken.append(time.perf_counter() - start)
    return min(taken)


if __name__ == "__main__":
    main()

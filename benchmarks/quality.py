"""How far a server's outputs are from those of the float32 weights: top tokens and log-probabilities on a fixed text.

    .venv/bin/python benchmarks/quality.py [--peer llama.cpp] [--tokens 10240] [--window 512] [--output benchmarks]

The reference is a plain transformers forward in float32 of the built-in model. After each token of a window, the next
one's distribution is compared: whether its top token is the reference's (agreement), and by how much that token's
log-probability differs. Castor computes each position in a decode step, llama.cpp in a request. The text was written by
the built-in model itself. The peers are installed by ./scripts/bench --peer NAME.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks.harness.contenders import LLAMA_CPP, Sizes, peer, started, versions
from benchmarks.harness.float_model import float_model
from benchmarks.harness.machine import choice_of
from benchmarks.harness.programs import ROOT
from engine.api.engine import EngineConfig
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.build import build_runner, load_tokenizer
from engine.scheduling.sequence import ScheduledChunk, Sequence
from server.bench.environment import describe
from server.bench.results.report import write
from server.bench.wire.client import BaseUrl
from server.config.models_file import load_specs
from server.config.settings import Settings
from server.models.registry import engine_config, weights_of

TEXT = Path(__file__).with_name("quality.txt")
NORMAL_95 = 1.96
LLAMA_TOP = 100
"""Candidates requested from llama.cpp: the reference's top token is among them or counts as missing."""


@dataclass(slots=True)
class Compared:
    """For each position of the text: 1.0 where the top tokens agree, and the absolute difference of
    log-probabilities."""

    agrees: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    missing: int = 0

    def add(self, agrees: bool, difference: float) -> None:
        self.agrees.append(float(agrees))
        self.differences.append(difference)

    def summary(self) -> dict[str, Any]:
        """Means with half the width of their 95 % intervals."""
        return {
            "places": len(self.agrees),
            "agreement": interval(self.agrees),
            "mean_abs_logprob_difference": interval(self.differences),
            "missing": self.missing,
        }


def interval(values: list[float]) -> list[float]:
    """Mean and half the width of its 95 % interval, by the normal approximation."""
    return [fmean(values), NORMAL_95 * stdev(values) / math.sqrt(len(values))]


def main() -> None:
    """Compute the reference, then each server's difference from it, position by position; print and write JSON."""
    options = read_options()
    settings = Settings.from_env(os.environ)
    spec = load_specs(ROOT / "models.yaml")[0]
    folder = weights_of(spec, settings.cache_dir)
    windows = cut(load_tokenizer(folder), options.tokens, options.window)
    tops = reference(folder, windows)
    found = {"castor": compare_castor(engine_config(spec, folder, settings.cache_dir), windows, tops)}
    packages = {"castor": versions(Path(sys.executable), ("torch", "transformers"))}
    choice, builds = choice_of(spec), {}
    for name in options.peer:
        contender = peer(name, spec, settings, choice)
        packages[name] = versions(contender.python, contender.packages)
        builds[name] = contender.build
        with started(contender, Sizes(1, options.window + 128, choice.threads)) as target:
            found[name] = compare_llama_cpp(target.url, windows, tops)
    environment = describe(["benchmarks/quality.py", *sys.argv[1:]], packages, ROOT)
    environment |= asdict(choice) | {"builds": builds}
    content = {"scenario": "quality", "environment": environment, "window": options.window, **summaries(found)}
    print(json.dumps(content, indent=2))
    print(f"all numbers: {write(content, options.output)}")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare distributions with those of the float32 weights.")
    parser.add_argument("--peer", action="append", default=[], choices=LLAMA_CPP)
    parser.add_argument("--tokens", type=int, default=10240)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--output", type=Path, default=Path("benchmarks"))
    return parser.parse_args()


def summaries(found: dict[str, Compared]) -> dict[str, Any]:
    """The numbers of all servers, and the paired differences of Castor to each peer."""
    answer: dict[str, Any] = {name: compared.summary() for name, compared in found.items()}
    ours = found["castor"]
    for name in found.keys() - {"castor"}:
        theirs = found[name]
        answer[f"castor minus {name}"] = {
            "agreement": paired(ours.agrees, theirs.agrees),
            "mean_abs_logprob_difference": paired(ours.differences, theirs.differences),
        }
    return answer


def paired(ours: list[float], theirs: list[float]) -> list[float]:
    """The mean difference at the same positions, and half the width of its 95 % interval."""
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])


def cut(tokenizer: Tokenizer, tokens: int, window: int) -> list[list[int]]:
    """The text's tokens in windows of equal length, at least ``tokens`` in all."""
    ids = tokenizer.encode(TEXT.read_text("utf-8"), add_special_tokens=False).ids
    count = -(-tokens // window)
    if len(ids) < count * window:
        raise SystemExit(f"--tokens is {tokens}, but {count} windows of {window} need more than the text's {len(ids)}")
    return [ids[start : start + window] for start in range(0, count * window, window)]


def reference(folder: Path, windows: list[list[int]]) -> list[list[tuple[int, float]]]:
    """The top token after each position and its log-probability, by transformers in float32."""
    model = float_model(folder)
    tops = []
    for window in windows:
        with torch.inference_mode():
            best = model(input_ids=torch.tensor([window]), use_cache=False).logits[0].log_softmax(-1).max(-1)
        tops.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
    return tops


def compare_castor(config: EngineConfig, windows: list[list[int]], tops: list[list[tuple[int, float]]]) -> Compared:
    """Every position in a decode step of the engine's own runner, all windows in one batch."""
    runner = build_runner(config, lambda _stage, _share: None, load_tokenizer(Path(config.path)))
    pages = -(-len(windows[0]) // runner.info.block_size)
    sequences = []
    for number, window in enumerate(windows):
        sequence = Sequence(Request(str(number), tuple(window[:1]), SamplingParams(1)), 0, [])
        sequence.blocks = list(range(number * pages, (number + 1) * pages))
        sequences.append(sequence)
    compared = Compared()
    for place in range(len(windows[0])):
        for sequence, window in zip(sequences, windows, strict=True):
            sequence.tokens = window[: place + 1]
        logits = runner.forward([ScheduledChunk(sequence, place, 1) for sequence in sequences])
        logprobs = torch.as_tensor(logits).log_softmax(-1)
        for row, top in zip(logprobs, tops, strict=True):
            token, logprob = top[place]
            compared.add(int(row.argmax()) == token, abs(float(row[token]) - logprob))
    return compared


def compare_llama_cpp(url: BaseUrl, windows: list[list[int]], tops: list[list[tuple[int, float]]]) -> Compared:
    """Every position in a request for one token after the text up to it; the server caches what it has computed."""
    by_place: list[list[tuple[bool, float]]] = [[] for _ in windows[0]]
    compared = Compared()
    for window, top in zip(windows, tops, strict=True):
        for place, (token, logprob) in enumerate(top):
            best = llama_cpp_top(url, window[: place + 1])
            if token not in best:
                compared.missing += 1
            difference = abs(best.get(token, min(best.values())) - logprob)
            by_place[place].append((max(best, key=best.__getitem__) == token, difference))
    for place_results in by_place:  # in the order of the other comparison, so that the two can be paired
        for agrees, difference in place_results:
            compared.add(agrees, difference)
    return compared


def llama_cpp_top(url: BaseUrl, prompt: list[int]) -> dict[int, float]:
    """The log-probabilities of the most likely next tokens, before any sampling."""
    body = {
        "prompt": prompt,
        "n_predict": 1,
        "temperature": 0,
        "n_probs": LLAMA_TOP,
        "cache_prompt": True,
        "id_slot": 0,
    }
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    return {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}


if __name__ == "__main__":
    main()

"""What it costs in accuracy to keep keys and values in bfloat16 or fp8, each against float32.

    .venv/bin/python benchmarks/kv_dtype.py [--tokens 2048] [--window 512] [--output benchmarks]

First attention alone on random normal numbers: the error of its outputs as a share of their size. Then the built-in
model over a fixed text, in windows: everything is computed in float32, and only what the cache holds is rounded. The
measures are those of the next token at each position: by how much its log-probability differs, the Kullback-Leibler
divergence of the distributions, whether the top tokens agree, and the perplexity.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.programs import ROOT
from benchmarks.quality import cut, interval
from engine.api.block_groups import BlockGroup
from engine.api.engine import EngineConfig, ModelInfo
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.attention.base import AttentionOptions
from engine.attention.gather import ReferenceAttention
from engine.build import load_tokenizer
from engine.cache.kv_tensors import KVCache
from engine.cache.layout import KVShape
from engine.model.loader import LoadedModel, load_model
from engine.runner.torch_runner import ModelRunner
from engine.scheduling.flat_batch import FlatBatch, flatten
from engine.scheduling.sequence import ScheduledChunk, Sequence
from server.bench.environment import describe
from server.bench.results.report import write
from server.config.models_file import load_specs
from server.config.settings import Settings
from server.models.registry import weights_of

CPU = torch.device("cpu")
BLOCK_SIZE = 16
SHAPE, HEADS = KVShape(8, 128, 128), 32
KINDS = ("float32", "bfloat16", "fp8")


class Bfloat16Kept(ReferenceAttention):
    """Computes in float32 with keys and values that were rounded to bfloat16."""

    def write_kv(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().write_kv(layer, keys.bfloat16().to(keys.dtype), values.bfloat16().to(values.dtype))


def main() -> None:
    """Measure both, print and write JSON."""
    parser = argparse.ArgumentParser(description="Compare a cache in bfloat16 and in fp8 with one in float32.")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--output", type=Path, default=Path("benchmarks"))
    options = parser.parse_args()
    settings = Settings.from_env(os.environ)
    folder = weights_of(load_specs(ROOT / "models.yaml")[0], settings.cache_dir)
    content = {
        "scenario": "kv-fp8",
        "environment": describe(["benchmarks/kv_dtype.py", *sys.argv[1:]], {}, ROOT),
        "window": options.window,
        "attention": {str(keys): attention_errors(keys) for keys in (128, 1024, 8192)},
        "model": model_differences(folder, cut(load_tokenizer(folder), options.tokens, options.window)),
    }
    print(json.dumps(content, indent=2))
    print(f"all numbers: {write(content, options.output)}")


def attention_errors(num_keys: int) -> dict[str, float]:
    """The root of the mean squared error of decodes over ``num_keys`` keys, as a share of that of the outputs.

    "bfloat16" and "fp8" compute in bfloat16, as a GPU does; "fp8, float32" has no other error than that of the cache.
    """
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(num_keys, SHAPE.heads, 128, generator=generator) for _ in range(2))
    queries = torch.randn(32, HEADS, 128, generator=generator)

    def attended(dtype: torch.dtype, *, fp8: bool) -> torch.Tensor:
        cache = KVCache([SHAPE], -(-num_keys // BLOCK_SIZE), BLOCK_SIZE, dtype=dtype, device=CPU, fp8=fp8)
        backend = ReferenceAttention(cache)
        sequence = sequence_of([0] * num_keys)
        backend.prepare(flatten([ScheduledChunk(sequence, 0, num_keys)], BLOCK_SIZE))
        backend.write_kv(0, keys.to(dtype), values.to(dtype))
        backend.prepare(flatten([ScheduledChunk(sequence, num_keys - 1, 1)] * len(queries), BLOCK_SIZE))
        return backend.attend(0, queries.to(dtype), AttentionOptions(128**-0.5)).float()

    exact = attended(torch.float32, fp8=False)
    found = {
        "bfloat16": attended(torch.bfloat16, fp8=False),
        "fp8": attended(torch.bfloat16, fp8=True),
        "fp8, float32": attended(torch.float32, fp8=True),
    }
    return {name: float((out - exact).norm() / exact.norm()) for name, out in found.items()}


def model_differences(folder: Path, windows: list[list[int]]) -> dict[str, Any]:
    """For each kind of cache, means over all positions with half the width of their 95 % intervals."""
    model = load_model(EngineConfig(path=str(folder), device="cpu", dtype="float32"), lambda _stage, _share: None)
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    for window in windows:
        following = torch.tensor(window[1:])[:, None]
        exact = torch.empty(0)
        for kind in KINDS:
            logprobs = next_logprobs(model, window, kind)
            if kind == "float32":
                exact = logprobs
            own, best = logprobs.gather(1, following)[:, 0], exact.gather(1, following)[:, 0]
            measured = {
                "surprise": -own,
                "abs_logprob_difference": (own - best).abs(),
                "divergence": (exact.exp() * (exact - logprobs)).sum(-1),
                "agreement": (logprobs.argmax(-1) == exact.argmax(-1)).float(),
            }
            for name, numbers in measured.items():
                found[kind].setdefault(name, []).extend(numbers.tolist())
    return {
        kind: {name: interval(numbers) for name, numbers in measures.items()}
        | {"positions": len(measures["surprise"]), "perplexity": math.exp(interval(measures["surprise"])[0])}
        for kind, measures in found.items()
    }


def next_logprobs(model: LoadedModel, window: list[int], kind: str) -> torch.Tensor:
    """The distributions after each token of ``window`` but the last: [tokens - 1, vocabulary]."""
    shapes = model.probe.shapes
    blocks = -(-len(window) // BLOCK_SIZE)
    cache = KVCache(shapes, blocks, BLOCK_SIZE, dtype=torch.float32, device=CPU, fp8=kind == "fp8")
    attention: Callable[..., ReferenceAttention] = Bfloat16Kept if kind == "bfloat16" else ReferenceAttention
    info = ModelInfo("", 0, "float32", "cpu", model.probe.vocab_size, len(window), BLOCK_SIZE, (BlockGroup(blocks),), 1)
    runner = ModelRunner(model, attention(cache), info)
    batch: FlatBatch = flatten([ScheduledChunk(sequence_of(window), 0, len(window))], BLOCK_SIZE)
    return runner.compute(replace(batch, sample_rows=array("i", range(len(window) - 1)))).log_softmax(-1)


def sequence_of(tokens: list[int]) -> Sequence:
    """A sequence whose blocks lie one after another."""
    sequence = Sequence(Request("text", (tokens[0],), SamplingParams(1)), 0, list(tokens))
    sequence.blocks = [*range(-(-len(tokens) // BLOCK_SIZE))]
    return sequence


if __name__ == "__main__":
    main()

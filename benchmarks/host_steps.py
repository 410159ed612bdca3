"""What a step of decodes costs the host where a GPU computes it: the whole core, with a device that does nothing.

    echo '{"folder": "MODEL_FOLDER", "sequences": [1, 64, 256], "temperatures": [0, 0.8], "steps": 300}' \
        | python benchmarks/host_steps.py

Steps are laid out, filled into the recorded buffers, sampled by the sampler of a GPU and read a step later; a replay
does nothing, and the logits of a vocabulary of 320 stay zeros. Every token read is replaced by another, so that texts
differ. Prints one line of JSON for each kind of step, in microseconds: of ``total``, the parts that make it up.
``forward`` is a part of ``launch``. Each is the 5th percentile, because a busy machine only adds.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from msgspec.msgpack import Encoder
from tokenizers import Tokenizer

from benchmarks.scheduler_steps import BLOCK_SIZE, PROMPT, make_requests, model_info
from engine.api.engine import EngineConfig, ModelInfo
from engine.api.sampling import SamplingParams
from engine.attention.triton_paged import TritonAttention
from engine.cache.kv_tensors import KVCache
from engine.cache.layout import KVShape
from engine.core.core import Core
from engine.runner.cuda_graphs import RecordedSteps, batch_sizes
from engine.sampling.device.device_sampler import DeviceSampler, Launched
from engine.scheduling.contracts import Sampled
from engine.scheduling.flat_batch import flatten
from engine.scheduling.sequence import ScheduledChunk

VOCAB_SIZE = 320  # of the logits, which cost the host the same whatever their size


class Runner:
    """Steps that are laid out and filled in, and replayed by doing nothing."""

    def __init__(self, info: ModelInfo) -> None:
        self.info = info
        self.full_steps = 0  # in a row, all sequences decoding
        self.sampled = torch.zeros(info.max_running, dtype=torch.long)
        device = torch.device("cpu")
        cache = KVCache([KVShape(8, 16, 16)], info.groups[0].num_blocks, BLOCK_SIZE, dtype=torch.float32, device=device)
        with torch.inference_mode():
            self.recorded = RecordedSteps(
                None,
                TritonAttention(cache),
                replace(info, vocab_size=VOCAB_SIZE),
                [info.groups[0].num_blocks - 1],
                record_nothing,
                self.sampled,
            )
            self.recorded.capture(lambda _stage, _done: None)

    def forward(self, chunks: list[ScheduledChunk]) -> torch.Tensor:
        """Logits that are zero."""
        batch = flatten(chunks, BLOCK_SIZE)
        is_full = batch.only_decodes and len(chunks) == self.info.max_running
        self.full_steps = self.full_steps + 1 if is_full else 0
        with torch.inference_mode():
            shape = self.recorded.shape_of(batch)
            if shape is None:  # prompts, before the measurement
                return torch.zeros(len(batch.sample_rows), VOCAB_SIZE)
            return self.recorded.forward(batch, shape)

    def check(self) -> None:
        """Nothing can fail."""

    def shortage(self, error: BaseException) -> None:
        """Nothing can fail."""


class Sampler(DeviceSampler):
    """Its tokens are replaced when they are read, by those of the prompt in turns."""

    def finish(self, launched: Launched) -> list[Sampled]:
        return [
            sampled._replace(token_id=sequence.request.prompt[len(sequence.tokens) % PROMPT])
            for sampled, sequence in zip(super().finish(launched), launched.plan.sequences, strict=True)
        ]


class Stopwatch:
    """Adds up the seconds of the methods that it is given, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The same method, timed."""

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = method(*arguments)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            return result

        return timed


def record_nothing(_compute: Callable[[], None]) -> Callable[[], None]:
    """A recording whose replay does nothing."""
    return lambda: None


def main() -> None:
    """Measure each combination and print."""
    task = json.load(sys.stdin)
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(Path(task["folder"]) / "tokenizer.json"))
    for sequences in task["sequences"]:
        for temperature in task["temperatures"]:
            parts = measured(tokenizer, sequences, temperature, task["steps"])
            print(json.dumps({"sequences": sequences, "temperature": temperature, **parts}), flush=True)


def measured(tokenizer: Tokenizer, number: int, temperature: float, steps: int) -> dict[str, int]:
    """Microseconds of each part of a step of ``number`` decodes, at the 5th percentile of ``steps``."""
    info = model_info(tokenizer.get_vocab_size(), number, steps)
    runner, watch = Runner(info), Stopwatch()
    sampler = Sampler(runner.recorded.logits, runner.sampled, batch_sizes(info.max_running), record_nothing)
    config = EngineConfig(path="", max_running=number, step_target_ms=1e9)
    core = Core(runner, sampler, tokenizer, config, ahead=True)
    pack = Encoder().encode
    core.stream_during_forward(watch.time("pack", lambda events: pack(events)))
    sampling = SamplingParams(max_tokens=info.max_context, temperature=temperature, top_p=0.95)
    for request in make_requests(info, number):
        core.submit(replace(request, sampling=sampling))
    runner.forward = watch.time("forward", runner.forward)  # type: ignore[method-assign]
    for owner, method, name in (
        (core._scheduler, "schedule", "schedule"),
        (core._executor, "launch", "launch"),
        (core._output, "feed_deferred", "text"),
        (core._executor, "finish", "finish"),
    ):
        setattr(owner, method, watch.time(name, getattr(owner, method)))
    gc.freeze()
    rows: list[dict[str, float]] = []
    while len(rows) < steps:
        watch.seconds.clear()
        started = time.perf_counter()
        core.step()
        row = watch.seconds | {"total": time.perf_counter() - started}
        if runner.full_steps > 2:  # what is read and written is of a full step too
            rows.append(row)
    core.close()
    return {name: round(1e6 * sorted(row.get(name, 0.0) for row in rows)[len(rows) // 20]) for name in rows[-1]}


if __name__ == "__main__":
    main()

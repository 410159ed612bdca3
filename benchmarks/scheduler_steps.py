"""What a step costs without the model: the scheduler alone, and the whole core with a model that computes nothing.

    echo '{"folder": "MODEL_FOLDER", "requests": 256, "steps": 200}' | python benchmarks/scheduler_steps.py

All requests decode together, one token each per step. Prints one line of JSON, microseconds a step.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from statistics import fmean, median

from tokenizers import Tokenizer

from engine.api.block_groups import BlockGroup
from engine.api.engine import EngineConfig, ModelInfo
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.cache.block_pool import BlockPool
from engine.constraints.masks import Mask
from engine.core.core import Core
from engine.scheduling.chunk_budget import MIN_CHUNK, FittedCost, StepPacer
from engine.scheduling.contracts import Sampled
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import ScheduledChunk, Sequence
from engine.scheduling.sequence_memory import SequenceMemory

PROMPT = 64
BLOCK_SIZE = 16


class NoModel:
    """A runner that computes nothing."""

    def __init__(self, info: ModelInfo) -> None:
        self.info = info

    def forward(self, batch: list[ScheduledChunk]) -> None:
        """Returns no logits."""

    def check(self) -> None:
        """Nothing can fail."""

    def shortage(self, error: BaseException) -> None:
        """Nothing can fail."""


class NextToken:
    """A sampler that counts: it returns the token after the last one, so that texts differ."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def launch(
        self, _logits: None, sequences: list[Sequence], _masks: list[Mask | None], _pending: list[int | None]
    ) -> list[Sequence]:
        """Keeps the owners of the rows."""
        return sequences

    def finish(self, sequences: list[Sequence]) -> list[Sampled]:
        """One token for each row."""
        return [Sampled((sequence.tokens[-1] + 1) % self._vocab_size, None) for sequence in sequences]


def main() -> None:
    """Measure both and print."""
    task = json.load(sys.stdin)
    requests, steps = task["requests"], task["steps"]
    tokenizer = Tokenizer.from_file(str(Path(task["folder"]) / "tokenizer.json"))
    info = model_info(tokenizer.get_vocab_size(), requests, steps)
    gc.freeze()
    numbers = percentiles("schedule", scheduler_seconds(info, requests, steps))
    numbers |= percentiles("step", core_seconds(info, tokenizer, requests, steps))
    print(json.dumps(numbers | {"requests": requests, "steps": steps}))


def model_info(vocab_size: int, requests: int, steps: int) -> ModelInfo:
    """A model with room for all requests, so that none waits or is preempted."""
    # No answer may end before the last prompt is computed, which takes longest in the smallest chunks.
    length = PROMPT + 2 * steps + requests * PROMPT // MIN_CHUNK
    return ModelInfo(
        model_type="none",
        num_parameters=0,
        dtype="float32",
        device="cpu",
        vocab_size=vocab_size,
        max_context=length,
        block_size=BLOCK_SIZE,
        groups=(BlockGroup((length // BLOCK_SIZE + 1) * (requests + 1)),),
        max_running=requests,
    )


def make_requests(info: ModelInfo, number: int) -> list[Request]:
    """Prompts that share nothing; no answer ends before the measurement does."""
    sampling = SamplingParams(max_tokens=info.max_context, temperature=0.0)
    prompts = [tuple((index * PROMPT + place) % info.vocab_size for place in range(PROMPT)) for index in range(number)]
    return [Request(str(index), prompt, sampling) for index, prompt in enumerate(prompts)]


def scheduler_seconds(info: ModelInfo, number: int, steps: int) -> list[float]:
    """Seconds of scheduling and committing each step, without the model, the sampler and the text."""
    pacer = StepPacer(1e9, FittedCost())
    pacer.record(0, PROMPT, 1e-6)  # prefill is cheap, so that all sequences decode soon
    scheduler = Scheduler(SequenceMemory([BlockPool(info.groups[0].num_blocks, info.block_size)]), pacer, number)
    sequences = [Sequence(request, 0, list(request.prompt)) for request in make_requests(info, number)]
    for sequence in sequences:
        scheduler.add([sequence])
    taken: list[float] = []
    while len(taken) < steps:
        started = time.perf_counter()
        batch = scheduler.schedule()
        scheduled = time.perf_counter() - started
        sampling = [work.sequence for work in batch if work.samples]
        started = time.perf_counter()
        for work in batch:
            scheduler.commit(work)
        committed = time.perf_counter() - started
        for sequence in sampling:
            sequence.tokens.append((sequence.tokens[-1] + 1) % info.vocab_size)
        if len(sampling) == number:
            taken.append(scheduled + committed)
    return taken


def core_seconds(info: ModelInfo, tokenizer: Tokenizer, number: int, steps: int) -> list[float]:
    """Seconds of each whole step of the core: scheduling, committing, text, events."""
    config = EngineConfig(path="", max_running=number, step_target_ms=1e9)
    core = Core(NoModel(info), NextToken(info.vocab_size), tokenizer, config)
    for request in make_requests(info, number):
        core.submit(request)
    taken: list[float] = []
    while len(taken) < steps:
        started = time.perf_counter()
        events = core.step()
        seconds = time.perf_counter() - started
        if len(events) > number // 2:  # an incomplete character is sent with a later step
            taken.append(seconds)
    core.close()
    return taken


def percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    """Mean, median and 99th percentile in microseconds."""
    ordered = sorted(seconds)
    return {
        f"{name}_us_mean": 1e6 * fmean(ordered),
        f"{name}_us_p50": 1e6 * median(ordered),
        f"{name}_us_p99": 1e6 * ordered[min(int(0.99 * len(ordered)), len(ordered) - 1)],
    }


if __name__ == "__main__":
    main()

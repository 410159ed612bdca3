"""The engine's core without HTTP and in the same process, under the same closed loop as a server.

    python benchmarks/bare_core.py <task.json

The task holds ``config`` (the fields of ``EngineConfig``), ``prompts`` (texts of users), ``streams`` (requests at once)
and ``tokens`` (the limit of an answer); ``least`` requests are made, and more until ``seconds`` have passed.
``warm_up`` and ``warm_up_tokens`` are the ``prompts`` and ``tokens`` of a first run that is not measured.
Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from engine.api.engine import EngineConfig
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.build import build_core
from engine.core.core import Core


@dataclass(slots=True)
class Done:
    """The results of a loop."""

    seconds: float
    tokens: int
    steps: int
    failed: int


def main() -> None:
    """Load, warm up, measure, print."""
    task = json.load(sys.stdin)
    core = build_core(EngineConfig(**task["config"]), lambda _stage, _share: None)
    folder, tokens = Path(task["config"]["path"]), task["tokens"]
    run(core, requests(core, folder, task["warm_up"], task["warm_up_tokens"], "warm-up"), task["streams"])
    measured = requests(core, folder, task["prompts"], tokens, "measured")
    done = run(core, measured, task["streams"], task["least"], task["seconds"])
    core.close()
    answer = {
        "output_tokens_per_second": done.tokens / done.seconds,
        "seconds": done.seconds,
        "output_tokens": done.tokens,
        "steps": done.steps,
        "failed": done.failed,
    }
    print(json.dumps(answer))


def requests(core: Core, folder: Path, prompts: list[str], tokens: int, name: str) -> Iterator[Request]:
    """The prompts in the model's own template, greedy, as the front end would send them."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, stop_ids=core.info.eos_ids)
    made = []
    for number, prompt in enumerate(prompts):
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
        made.append(Request(f"{name}-{number}", tuple(ids), sampling))
    return iter(made)


def run(core: Core, waiting: Iterator[Request], streams: int, least: int | None = None, seconds: float = 0.0) -> Done:
    """A closed loop: each request that ends is followed by the next, as in ``server.bench.load.closed_loop``."""
    started, tokens, steps, failed, open_requests, made = time.perf_counter(), 0, 0, 0, 0, 0
    while True:
        while open_requests < streams and (request := next(waiting, None)) is not None:
            if least is not None and made >= least and time.perf_counter() - started >= seconds:
                waiting = iter(())
                break
            core.submit(request)
            open_requests += 1
            made += 1
        if not open_requests:
            return Done(time.perf_counter() - started, tokens, steps, failed)
        steps += 1
        for events in core.step():
            if events.done is not None:
                open_requests -= 1
                tokens += events.done.candidate_tokens
                failed += events.done.error is not None


if __name__ == "__main__":
    main()

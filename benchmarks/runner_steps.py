"""What a replayed step costs the host, without the device: lay it out, fill the recorded buffers, ask for the replay.

    echo '{"sequences": [1, 64, 256], "context": 1024, "prefill": [0, 504], "steps": 300}' \
        | python benchmarks/runner_steps.py

All sequences decode; with ``prefill`` above 0 a chunk of that many tokens is computed beside them. The model is never
called, and a replay does nothing. Prints one line of JSON for each kind of step: medians in microseconds.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from array import array
from statistics import median

import torch

from engine.api.engine import ModelInfo
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.attention.triton_paged import TritonAttention
from engine.cache.kv_tensors import KVCache
from engine.cache.layout import KVShape
from engine.runner.cuda_graphs import RecordedSteps
from engine.scheduling.flat_batch import flatten
from engine.scheduling.sequence import ScheduledChunk, Sequence

BLOCK_SIZE = 16
NUM_BLOCKS = 64  # sequences share them: only their numbers matter here


def main() -> None:
    """Measure each combination and print."""
    task = json.load(sys.stdin)
    torch.set_num_threads(1)
    context, most = task["context"], max(task["sequences"])
    room = context + BLOCK_SIZE + max(task["prefill"])
    info = ModelInfo("none", 0, "float32", "cpu", 320, max(room, 1024), BLOCK_SIZE, NUM_BLOCKS, most + 1)
    device = torch.device("cpu")
    attention = TritonAttention(
        KVCache([KVShape(8, 16, 16)], NUM_BLOCKS, BLOCK_SIZE, dtype=torch.float32, device=device)
    )
    with torch.inference_mode():
        sampled = torch.zeros(info.max_running, dtype=torch.long)
        steps = RecordedSteps(None, attention, info, NUM_BLOCKS - 1, lambda _compute: lambda: None, sampled)
        steps.capture(lambda _stage, _done: None)
        for sequences in task["sequences"]:
            for prefill in task["prefill"]:
                chunks = [chunk_of(context, 1) for _ in range(sequences)]
                if prefill:
                    chunks.append(chunk_of(0, prefill))
                found = measured(steps, chunks, task["steps"])
                print(json.dumps({"sequences": sequences, "prefill": prefill, **found}))


def chunk_of(past: int, count: int) -> ScheduledChunk:
    """A chunk of ``count`` tokens after ``past`` of a sequence of its own."""
    blocks = array("i", [number % NUM_BLOCKS for number in range((past + count - 1) // BLOCK_SIZE + 1)])
    request = Request("benchmark", (1,), SamplingParams(max_tokens=1))
    return ScheduledChunk(Sequence(request, 0, [7] * (past + count), blocks=blocks), past, count)


def measured(steps: RecordedSteps, chunks: list[ScheduledChunk], number: int) -> dict[str, float]:
    """Median microseconds of laying a step out, and of all that its replay asks of the host."""
    flattened, replayed = [], []
    gc.freeze()
    for _ in range(number):
        started = time.perf_counter()
        batch = flatten(chunks, BLOCK_SIZE)
        laid_out = time.perf_counter()
        shape = steps.shape_of(batch)
        assert shape is not None, "the step is larger than any that is recorded"
        steps.forward(batch, shape)
        flattened.append(laid_out - started)
        replayed.append(time.perf_counter() - laid_out)
    return {"flatten_us": round(1e6 * median(flattened), 1), "replay_us": round(1e6 * median(replayed), 1)}


if __name__ == "__main__":
    main()

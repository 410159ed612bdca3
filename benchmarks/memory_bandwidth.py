"""The bandwidth of the memory that a decode step reads its weights from: copying and reading, one thread for each core.

    echo '{"threads": null}' | python benchmarks/memory_bandwidth.py

Prints one line of JSON, bytes a second: ``copy`` counts each byte twice, read and written, as STREAM does; ``read`` is
the sum of a tensor. The best of several passes over half a GiB, far more than any cache; on a GPU where there is one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

from engine.device.cpu_count import cores

BYTES = 512 * 1024 * 1024
PASSES = 12


def main() -> None:
    """Measure and print."""
    threads = json.load(sys.stdin).get("threads")
    torch.set_num_threads(threads or cores())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.ones(BYTES // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    copy = best_seconds(lambda: target.copy_(source), device)
    read = best_seconds(source.sum, device)
    print(json.dumps({"copy": 2 * BYTES / copy, "read": BYTES / read}))


def best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest time of a pass; the first one, which touches fresh pages, is not counted."""
    seconds = []
    for _ in range(PASSES + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


if __name__ == "__main__":
    main()

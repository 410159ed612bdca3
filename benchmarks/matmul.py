"""Only the matrix products of a decode step: our C code for each weight format and torch, in turn on the same sizes.

    .venv/bin/python benchmarks/matmul.py [--threads 2] [--rounds 5] [--formats]

The sizes are the linear maps of the built-in model's 30 layers, without the output head; every layer has weights of its
own, so that they come from memory. Prints milliseconds, the median over rounds of the fastest of three steps. With
``--formats`` all formats are measured, on maps whose columns are whole blocks of each.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median

import torch

from engine.native.compiled.compiler import FLAGS, LIBRARIES, find_compiler
from engine.native.compiled.machine_code import TARGETS
from engine.native.packing import Format

LAYERS, TIMES = 30, 3
CHANNELS, COLUMNS = (960, 576, 3072, 576), (576, 576, 576, 1536)
ROUND = (2048, 1024, 2048, 1024), (1024, 1024, 1024, 1024)
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
Step = Callable[[int], float]
"""Seconds of a step with that many rows."""


def main() -> None:
    """Measure all variants in turn, round after round."""
    parser = argparse.ArgumentParser(description="Time the products of a decode step.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--formats", action="store_true")
    options = parser.parse_args()
    if options.formats:
        ways = {f"C, {format.name}": c_step(format, options.threads, ROUND) for format in Format}
    else:
        ways = {"torch, float32": torch_step(torch.float32), "torch, bfloat16": torch_step(torch.bfloat16)}
        ways |= {f"C, {kind.name}": c_step(kind, options.threads) for kind in (Format.FLOAT, Format.Q8_0, Format.Q4_0)}
    torch.set_num_threads(options.threads)
    found = {
        (way, rows): [1e3 * step(rows) for _ in range(options.rounds)] for rows in ROWS for way, step in ways.items()
    }
    print("ms for rows      " + "".join(f"{rows:>9}" for rows in ROWS))
    for way in ways:
        print(f"{way:<17}" + "".join(f"{median(found[way, rows]):>9.2f}" for rows in ROWS))


def torch_step(dtype: torch.dtype) -> Step:
    sizes = list(zip(CHANNELS, COLUMNS, strict=True))
    weights = [[torch.randn(channels, columns).to(dtype) for channels, columns in sizes] for _ in range(LAYERS)]

    def step(rows: int) -> float:
        inputs = [torch.randn(rows, columns).to(dtype) for columns in COLUMNS]
        taken = []
        with torch.inference_mode():
            for _ in range(TIMES):
                start = time.perf_counter()
                for layer in weights:
                    for weight, source in zip(layer, inputs, strict=True):
                        torch.nn.functional.linear(source, weight)
                taken.append(time.perf_counter() - start)
        return min(taken)

    return step


def c_step(format: Format, threads: int, sizes: tuple[tuple[int, ...], tuple[int, ...]] = (CHANNELS, COLUMNS)) -> Step:
    code = compiled()
    channels, columns = ((ctypes.c_int32 * 4)(*numbers) for numbers in sizes)

    def step(rows: int) -> float:
        widest = max(map(max, sizes))
        seconds: float = code.time_step(int(format), rows, threads, LAYERS, TIMES, channels, columns, widest)
        if seconds < 0:
            raise MemoryError("there is no memory for the weights")
        return seconds

    return step


@cache
def compiled() -> ctypes.CDLL:
    """The C library of this folder, compiled for this processor."""
    source = Path(__file__).with_suffix(".c")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "matmul.so"
        subprocess.run([*find_compiler(), *FLAGS, *TARGETS[0], "-o", str(made), str(source), *LIBRARIES], check=True)
        code = ctypes.CDLL(str(made))
    code.time_step.restype = ctypes.c_double
    return code


if __name__ == "__main__":
    main()

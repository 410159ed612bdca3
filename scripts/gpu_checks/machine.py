"""The machine that the checks run on: its clocks, its recordings, and its peak rates."""

from __future__ import annotations

import gc
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers

from engine.runner.cuda_graphs import CudaRecorder, Recorder
from engine.runner.memory_profile import Attention

SPELLS = 3
"""Every number is the median of this many, after a warm-up."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the checks run. ``smoke`` is a run on a CPU that exercises the code; its numbers mean nothing.

    ``record`` replaces CUDA's recordings where there are none.
    """

    device: torch.device
    smoke: bool
    attention: Attention
    record: Recorder | None

    @property
    def name(self) -> str:
        return "CPU, smoke run" if self.smoke else torch.cuda.get_device_name(self.device)

    @property
    def dtype(self) -> torch.dtype:
        """The type of models' weights here."""
        return torch.float32 if self.smoke else torch.bfloat16

    @property
    def cache_bytes(self) -> int:
        """The device's own cache: inputs that must come from memory have to be larger in total."""
        if self.smoke:
            return 1 << 12
        return int(getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 64 << 20))

    def wait(self) -> None:
        """Wait until the device has finished all work."""
        if not self.smoke:
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Free the memory of what is no longer referenced."""
        gc.collect()
        if not self.smoke:
            torch.cuda.empty_cache()

    def mark(self) -> Any:
        """The current time on the device's own clock."""
        if self.smoke:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Device seconds between two marks that it has passed."""
        return float(end - begin) if self.smoke else float(begin.elapsed_time(end)) / 1000

    def seconds(self, work: Callable[[], object]) -> float:
        """How long ``work`` takes until the device is done, by the host's clock."""
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def device_seconds(self, work: Callable[[], object], times: int = 1) -> float:
        """How long the device takes for ``work``: the median of three spells of ``times`` calls, after a warm-up."""
        work()
        spells = []
        for _ in range(SPELLS):
            self.wait()
            begin = self.mark()
            for _ in range(times):
                work()
            end = self.mark()
            self.wait()
            spells.append(self.between(begin, end) / times)
        return median(spells)

    def recorded(self, work: Callable[[], None]) -> Callable[[], None]:
        """``work`` as one launch, so that its time does not include launching kernels."""
        # A recorder for each: torch forbids recording into a memory pool whose last recording is gone.
        return (self.record or CudaRecorder())(work)

    def random(self, *shape: int) -> torch.Tensor:
        """Normally distributed numbers. Never zeros: products and copies of zeros may be faster than of real data."""
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_()


def environment(machine: Machine) -> dict[str, str]:
    """The environment that a result depends on."""
    try:
        import triton

        triton_version = str(triton.__version__)
    except ImportError:
        triton_version = "missing"
    found = {
        "device": machine.name,
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "transformers": str(transformers.__version__),
        "triton": triton_version,
        "python": sys.version.partition(" ")[0],
        "system": platform.platform(),
    }
    if not machine.smoke:
        properties = torch.cuda.get_device_properties(machine.device)
        found["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        found["multiprocessors"] = str(properties.multi_processor_count)
        found["its cache"] = f"{machine.cache_bytes / 2**20:.0f} MiB"
    return found


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured rates: bytes per second of a large copy, read and written, and operations per second of a large
    product."""

    copy: float
    matmul: float


@torch.inference_mode()
def measure_ceilings(machine: Machine) -> Ceilings:
    """On random numbers, in seconds."""
    numbers = 1 << (16 if machine.smoke else 30)
    source = machine.random(numbers)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / machine.device_seconds(partial(target.copy_, source), times=4)
    del source, target
    machine.forget()
    size = 64 if machine.smoke else 8192
    a, b = machine.random(size, size), machine.random(size, size)
    matmul = 2 * size**3 / machine.device_seconds(partial(torch.matmul, a, b), times=8)
    del a, b
    machine.forget()
    return Ceilings(copy, matmul)

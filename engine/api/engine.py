"""The engine's public interface: its configuration, what it can do, and its health."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf
from typing import Protocol

from engine.api.block_groups import BlockGroup
from engine.api.errors import ModelRefused
from engine.api.events import Event
from engine.api.requests import Request

_LEAST = {"block_size": 1, "state_stride": 1, "max_running": 1, "max_waiting": 0, "threads": 1}
KV_DTYPES = ("auto", "fp8")
QUANTIZE = ("none", "q8", "q4", "fp8")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an engine process is started with.

    ``path`` is a prepared folder (config, safetensors, tokenizer). ``dtype`` and ``device`` are torch names or "auto".
    ``max_context`` None means the model's own. ``kv_memory`` is a share of the free GPU memory if at most 1, else
    bytes; None means the default of the device. ``kv_dtype`` is how keys and values are kept: "auto", in the model's
    type, or "fp8" (``engine.cache.fp8``), in about half of the memory. Models with recurrent states keep a copy of them
    every ``state_stride`` tokens, rounded up to whole blocks. ``step_target_ms`` bounds steps with prefill.
    ``max_waiting`` bounds the requests that wait while ``max_running`` sequences run; a ``max_running`` of None means
    the device's default, which ``ModelInfo`` reports. ``native`` lets C code compute the models that it supports on a
    CPU; it is compiled once into ``cache_dir``, or at each start without one. ``cuda_graphs`` makes a GPU replay
    recorded steps. ``quantize`` packs weights that are not quantised at the load, on a CPU (``engine.packed.places``).

    Raises ``ModelRefused`` for a number outside its bounds, naming field, value and limit; ``max_context`` is checked
    where the model's own limit is known (``engine.model.eligibility``).
    """

    path: str
    dtype: str = "auto"
    device: str = "auto"
    max_context: int | None = None
    kv_memory: float | None = None
    kv_dtype: str = "auto"
    block_size: int = 16
    state_stride: int = 1024
    max_running: int | None = None
    max_waiting: int = 256
    step_target_ms: float = 150.0
    threads: int | None = None
    native: bool = True
    cache_dir: str | None = None
    cuda_graphs: bool = True
    quantize: str = "none"

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ModelRefused(f"{name} is {value}; give {least} or more")
        if not self.step_target_ms > 0:
            raise ModelRefused(f"step_target_ms is {self.step_target_ms}; give milliseconds above 0")
        if self.kv_memory is not None and not 0 < self.kv_memory < inf:
            raise ModelRefused(f"kv_memory is {self.kv_memory}; give a share above 0 and up to 1, or bytes")
        if self.kv_dtype not in KV_DTYPES:
            raise ModelRefused(f"kv_dtype is {self.kv_dtype!r}; give {' or '.join(KV_DTYPES)}")
        if self.quantize not in QUANTIZE:
            raise ModelRefused(f"quantize is {self.quantize!r}; give {' or '.join(QUANTIZE)}")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded engine can do. ``max_context`` counts prompt and answer together, in tokens; ``context_limit`` says
    why the model allows no more, where its positions do not tell.

    ``groups`` are the blocks of the layers that see equally much of the past. ``state_bytes`` are what recurrent layers
    carry for one sequence, 0 for models without such layers; of these states up to ``num_snapshots`` copies are kept
    for later sequences. Where a sequence of more than ``original_context`` tokens is rotated by other frequencies than
    a shorter one (LongRoPE), that is above 0.
    """

    model_type: str
    num_parameters: int
    dtype: str
    device: str
    vocab_size: int
    max_context: int
    block_size: int
    groups: tuple[BlockGroup, ...]
    max_running: int
    eos_ids: tuple[int, ...] = ()
    state_bytes: int = 0
    num_snapshots: int = 0
    original_context: int = 0
    context_limit: str = ""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for metrics: sequences running and waiting, KV blocks, slots of recurrent states that are used and
    snapshots of these that are kept, counters since the engine started."""

    running: int = 0
    waiting: int = 0
    used_blocks: int = 0
    cached_blocks: int = 0
    total_blocks: int = 0
    used_slots: int = 0
    snapshots: int = 0
    preemptions: int = 0
    steps: int = 0
    sampled_tokens: int = 0
    redrawn_tokens: int = 0


class EngineState(StrEnum):
    """The state of an engine; only READY engines take requests."""

    STOPPED = "stopped"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"  # permanently, and nothing is left to close: ``Health.detail`` says why


@dataclass(frozen=True, slots=True)
class Health:
    """What readiness probes and metrics read; ``progress`` runs from 0 to 1 while loading."""

    state: EngineState
    detail: str = ""
    progress: float = 0.0
    restarts: int = 0
    stats: EngineStats = field(default_factory=EngineStats)


class Engine(Protocol):
    """All that the front end knows of an engine: the process client, or a scripted fake in tests."""

    def describe(self) -> ModelInfo:
        """What the loaded model can do. Raises ``EngineUnavailable`` until it is loaded."""
        ...

    async def ready(self) -> ModelInfo:
        """Wait until the model can answer. Raises ``EngineUnavailable`` if it never will."""
        ...

    def room(self) -> int:
        """How many candidates it would accept at this moment; 0 where its queue is full, and until it is loaded."""
        ...

    def submit(self, request: Request) -> AsyncIterator[Event]:
        """Start a request. Raises ``Overloaded`` or ``EngineUnavailable`` at once; later outcomes are events.

        The caller reads until ``RequestFinished``; closing the iterator early cancels the request.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Stop a request; it still ends with its one ``RequestFinished``. Unknown ids are ignored."""
        ...

    def health(self) -> Health:
        """Never waits and never raises."""
        ...

    async def close(self) -> None:
        """End the engine; requests in flight get their terminal error."""
        ...

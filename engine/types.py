"""The values that cross the engine's border: requests in, events out, and the error tree.

Everything here is frozen and free of torch, HTTP and serialisation libraries, so that the scheduler,
the process border and the front end can share it.

One request yields, in this order within every step: ``Delta`` for each candidate that grew, one
``CandidateFinished`` for each candidate that ended, and, exactly once and last, ``RequestFinished``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

# --- Requests ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Thinking:
    """Where thoughts stand in the sampled tokens, and how many there may be.

    ``start`` and ``end`` are the token ids of the markers around thoughts; ``open`` tells that the prompt already wrote
    the start. After ``budget`` tokens of thoughts (None: free) the end is forced and the answer follows.
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    open: bool = False
    budget: int | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of a request are chosen; every candidate of a request shares it.

    ``temperature`` 0 means greedy. ``top_k`` 0 and ``top_p`` 1 switch the filter off. ``logprobs`` is None
    (none wanted) or the number of top candidates, 0 to 20, beside the chosen token. ``stop`` are strings that end the
    answer and are not part of it; ``stop_ids`` are tokens that end it (end of turn) and are never reported. Stop
    strings do not count in thoughts, nor between the pairs of ``stop_exempt`` (the beginning and the end of a call).

    ``grammar`` is an llguidance grammar (Lark or JSON) that the answer, after any thoughts, must follow. ``markers``
    are special tokens whose content stays in the text, because the caller's parser looks for it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    grammar: str | None = None
    thinking: Thinking | None = None
    markers: tuple[int, ...] = ()
    stop_exempt: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and what to make of it.

    ``prompt`` holds token ids (at least one). ``salt`` separates tenants in the prefix cache: equal prompts share
    pages only under equal salts. ``deadline`` is a ``time.monotonic()`` instant: all processes of a machine share it.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    candidates: int = 1
    salt: str = ""
    deadline: float | None = None


# --- Events --------------------------------------------------------------------------------------


class FinishReason(StrEnum):
    """Why a candidate ended."""

    STOP = "stop"  # an end token or a stop sequence
    MAX_TOKENS = "max_tokens"  # its own limit, or the end of the model's context
    MALFORMED = "malformed"  # the grammar could not be followed to its end; the message tells which limit was met
    ABORTED = "aborted"  # cancelled, expired or failed: the request's error tells


class TopLogprob(NamedTuple):
    """One alternative of a decoding step; the natural logarithm of its raw probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Raw log-probabilities (before temperature, penalties and masks) of one sampled token, ``top`` descending."""

    chosen: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one candidate gained in a step.

    ``text`` may lag behind ``token_ids``: characters that are not complete and the possible head of a stop
    sequence are held back. ``logprobs`` has one entry per token id, or is empty where none were asked for.
    ``thought`` tells that the tokens are thoughts or the markers around them.
    """

    candidate: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    thought: bool = False


@dataclass(frozen=True, slots=True)
class CandidateFinished:
    """A candidate ended. ``tokens`` counts its sampled tokens without the end token, ``thoughts`` those in thoughts."""

    candidate: int
    reason: FinishReason
    tokens: int
    thoughts: int = 0
    message: str = ""


class ErrorKind(StrEnum):
    """What kind of failure ended a request; the front end maps each to one status."""

    REFUSED = "refused"  # can never be served: the caller must change it
    OVERLOADED = "overloaded"  # the queue is full: try again later
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    UNAVAILABLE = "unavailable"  # the engine is loading, died or is shutting down
    INTERNAL = "internal"  # a step failed for this request alone


@dataclass(frozen=True, slots=True)
class RequestError:
    """Why a request did not run to its end, in one sentence for humans."""

    kind: ErrorKind
    message: str


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """The last event of a request. ``cached_tokens`` is the part of the prompt read from the prefix cache.

    ``candidate_tokens`` counts all sampled tokens of all candidates, ``thought_tokens`` those of them in thoughts.
    """

    prompt_tokens: int
    cached_tokens: int
    candidate_tokens: int
    error: RequestError | None = None
    thought_tokens: int = 0


Event = Delta | CandidateFinished | RequestFinished


@dataclass(frozen=True, slots=True)
class RequestEvents:
    """Everything that happened to one request in one step, in the order in which it is to be told."""

    request_id: str
    deltas: tuple[Delta, ...] = ()
    finished: tuple[CandidateFinished, ...] = ()
    done: RequestFinished | None = None

    def __iter__(self) -> Iterator[Event]:
        yield from self.deltas
        yield from self.finished
        if self.done is not None:
            yield self.done


# --- The engine as its users see it --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an engine process is started with.

    ``path`` is a prepared folder (config, safetensors, tokenizer). ``dtype`` and ``device`` are torch names or "auto".
    ``max_context`` None means the model's own. ``kv_memory`` is a share of the free GPU memory if at most 1, else
    bytes; None means the default of the device. ``step_target_ms`` bounds steps with prefill as ``engine.pacing`` says.
    ``max_waiting`` bounds the requests that wait while ``max_running`` sequences run; None means the default of the
    device, and ``ModelInfo`` tells it. ``native`` lets C code compute models that it fits on a CPU; it is compiled once
    into ``cache_dir``, or anew at each start without one. ``cuda_graphs`` has a GPU replay recorded decode steps.
    """

    path: str
    dtype: str = "auto"
    device: str = "auto"
    max_context: int | None = None
    kv_memory: float | None = None
    block_size: int = 16
    max_running: int | None = None
    max_waiting: int = 256
    step_target_ms: float = 150.0
    threads: int | None = None
    native: bool = True
    cache_dir: str | None = None
    cuda_graphs: bool = True


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded engine can do. ``max_context`` counts prompt and answer together, in tokens."""

    model_type: str
    num_parameters: int
    dtype: str
    device: str
    vocab_size: int
    max_context: int
    block_size: int
    num_blocks: int
    max_running: int
    eos_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for metrics: sequences running and waiting, KV blocks, counters since the engine started."""

    running: int = 0
    waiting: int = 0
    used_blocks: int = 0
    cached_blocks: int = 0
    total_blocks: int = 0
    preemptions: int = 0
    steps: int = 0


class EngineState(StrEnum):
    """Where an engine stands; only READY ones take requests."""

    STOPPED = "stopped"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"  # for good, and nothing of it is left to close: ``Health.detail`` says why


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
        """Wait until the model can answer. Raises ``EngineUnavailable`` where it never will."""
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


# --- Errors --------------------------------------------------------------------------------------
#
# EngineError
# ├── RequestRefused      the request can never be served; the message names the value and the limit
# ├── Overloaded          the queue is full
# ├── EngineUnavailable   loading, died, or closing
# └── ModelRefused        the model cannot be served; the message names the layer and the reason


class EngineError(Exception):
    """Base of everything that the engine raises on purpose."""


class RequestRefused(EngineError):
    """The request can never be served as it is."""


class Overloaded(EngineError):
    """The queue is full; the same request may succeed later."""


class EngineUnavailable(EngineError):
    """No engine can take the request now."""


class ModelRefused(EngineError):
    """The model in the folder cannot be served; the message names what is in the way."""

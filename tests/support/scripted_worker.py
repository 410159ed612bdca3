"""The real engine process around a core that follows a script, for tests of the process border.

``EngineConfig.path`` chooses how the core loads; the first prompt token of a request chooses what the request does.
Every step gives each candidate one token: 0, 1, 2, … with its text.
"""

from __future__ import annotations

import sys
import time
from enum import IntEnum
from pathlib import Path

from engine.api.block_groups import BlockGroup
from engine.api.engine import EngineConfig, EngineStats, ModelInfo
from engine.api.errors import ModelRefused
from engine.api.events import (
    CandidateFinished,
    Delta,
    ErrorKind,
    FinishReason,
    RequestError,
    RequestEvents,
    RequestFinished,
)
from engine.api.requests import Request
from engine.process.worker import Progress, main

COMMAND = (sys.executable, "-P", "-m", "support.scripted_worker")

REFUSAL = "layer 7 (MambaMixer) keeps a state that pages cannot hold"


class Kind(IntEnum):
    """The first prompt token of a request."""

    STEADY = 1
    HANGS = 2
    RAISES = 3
    PRINTS = 4
    SLOW = 5
    UNEVEN = 6  # candidate 0 ends after its first token
    PANICS = 7


class Panic(BaseException):
    """As Rust code panics: no ``Exception``."""


class ScriptedCore:
    def __init__(self, config: EngineConfig) -> None:
        self.info = ModelInfo(
            "scripted", 0, "float32", "cpu", 512, 4096, 16, (BlockGroup(256),), config.max_running or 64, eos_ids=(2,)
        )
        self._live: dict[str, tuple[Request, int]] = {}
        self._cancelled: set[str] = set()
        self._steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def submit(self, request: Request) -> None:
        self._live[request.id] = (request, 0)

    def cancel(self, request_id: str) -> None:
        if request_id in self._live:
            self._cancelled.add(request_id)

    def step(self) -> list[RequestEvents]:
        self._steps += 1
        time.sleep(0.001)
        events = [self._grow(request, step) for request, step in list(self._live.values())]
        ended = [self._end(request_id) for request_id in sorted(self._cancelled & self._live.keys())]
        self._cancelled.clear()
        return events + ended

    def _grow(self, request: Request, step: int) -> RequestEvents:
        match request.prompt[0]:
            case Kind.HANGS:
                time.sleep(3600)
            case Kind.RAISES:
                raise RuntimeError("device fault\nwith a second line")
            case Kind.PRINTS:
                print("a library prints")
            case Kind.SLOW:
                time.sleep(0.25)
            case Kind.PANICS:
                raise Panic("device fault")
        self._live[request.id] = (request, step + 1)
        uneven = request.prompt[0] == Kind.UNEVEN
        everyone = range(1 if uneven and step else 0, request.candidates)
        deltas = tuple(Delta(candidate, (step,), f"{step} ") for candidate in everyone)
        if step + 1 < request.sampling.max_tokens:
            first = (CandidateFinished(0, FinishReason.STOP, 1),) if uneven and not step else ()
            return RequestEvents(request.id, deltas, first)
        del self._live[request.id]
        finished = tuple(CandidateFinished(candidate, FinishReason.MAX_TOKENS, step + 1) for candidate in everyone)
        done = RequestFinished(len(request.prompt), 0, (step + 1) * request.candidates)
        return RequestEvents(request.id, deltas, finished, done)

    def _end(self, request_id: str) -> RequestEvents:
        request, step = self._live.pop(request_id)
        error = RequestError(ErrorKind.CANCELLED, "The request was cancelled.")
        finished = tuple(CandidateFinished(c, FinishReason.ABORTED, step) for c in range(request.candidates))
        return RequestEvents(
            request_id, (), finished, RequestFinished(len(request.prompt), 0, step * request.candidates, error)
        )

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self._live), steps=self._steps)

    def close(self) -> None:
        """It has no threads."""


def build(config: EngineConfig, progress: Progress) -> ScriptedCore:
    """Load as ``config.path`` says; "once:FILE" hangs until FILE exists, which it makes; FOLDER/hangs is enough.

    "served:FILE" is refused after its first start until FILE.back exists; FILE gets the devices that were asked for.
    """
    progress("weights", 0.5)
    if Path(config.path, "hangs").exists():
        time.sleep(3600)
    match config.path.partition(":"):
        case ("refuse", _, _):
            raise ModelRefused(REFUSAL)
        case ("panic", _, _):
            raise Panic("index out of bounds\nand a second line")
        case ("broken", _, _):
            raise KeyError("vocab")
        case ("crash", _, _):
            raise OSError("no space left on device\nand a second line")
        case ("slow", _, _):
            time.sleep(3600)
        case ("served", _, name):
            log = Path(name)
            started = log.read_text() if log.exists() else ""
            log.write_text(f"{started}{config.device} ")
            if started and not log.with_suffix(".back").exists():
                raise ModelRefused("device 'cuda:0' is not available")
        case ("steps", _, number):
            for step in range(int(number)):
                time.sleep(0.5)
                progress("weights", step / int(number))
        case ("once", _, name):
            marker = Path(name)
            if not marker.exists():
                marker.touch()
                time.sleep(3600)
    return ScriptedCore(config)


if __name__ == "__main__":
    main(build)

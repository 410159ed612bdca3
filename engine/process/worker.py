"""The engine process: passes messages between its one socket and the core, and ends with its parent.

Started as ``python -m engine.process.worker ADDRESS`` with the ``EngineConfig`` as one line of JSON on standard input,
whose other end the parent holds open for as long as it lives.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from types import TracebackType
from typing import Protocol, Self

import msgspec
import zmq

from engine.api.engine import EngineConfig, EngineStats, ModelInfo
from engine.api.errors import ModelRefused
from engine.api.events import ErrorKind, RequestError, RequestEvents, RequestFinished
from engine.api.requests import Request
from engine.device.allocator import take_memory_in_parts
from engine.failures import NOT_FAILURES, may_pass, sentence
from engine.process.messages import (
    EXIT_FAILED,
    EXIT_REFUSED,
    Cancel,
    Failed,
    FromWorker,
    Loading,
    Ready,
    Refused,
    StepEvents,
    Stop,
    Submit,
    ToWorker,
    pack,
    unpack_request,
    unpack_to_worker,
)
from engine.process.output import JsonLines

_LINGER_MS = 2000
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_log = logging.getLogger("castor.engine")


class WorkerCore(Protocol):
    """What the process runs: the real core, or a scripted one in tests."""

    info: ModelInfo

    @property
    def has_work(self) -> bool:
        """Whether another step would do anything."""
        ...

    def submit(self, request: Request) -> None: ...

    def cancel(self, request_id: str) -> None: ...

    def step(self) -> list[RequestEvents]: ...

    def stream_during_forward(self, stream: Callable[[list[RequestEvents]], None]) -> None: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


Progress = Callable[[str, float], None]
CoreFactory = Callable[[EngineConfig, Progress], WorkerCore]


class Border:
    """The process's socket: messages in, messages out, in order and without loss while the parent lives."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.linger = _LINGER_MS
        self._socket.connect(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._context.term()

    def send(self, message: FromWorker) -> None:
        self._socket.send(pack(message))

    def loading(self, stage: str, fraction: float) -> None:
        self.send(Loading(stage, fraction))

    def wait(self) -> None:
        """Sleep until a message has come."""
        self._socket.poll()

    def receive(self) -> list[ToWorker]:
        """All messages that have come by now; one that cannot be read is logged and skipped."""
        messages: list[ToWorker] = []
        while self._socket.poll(0):
            try:
                messages.append(unpack_to_worker(self._socket.recv()))
            except msgspec.MsgspecError as error:
                _log.error("Skipped a message that cannot be read: %s", error)
        return messages


def serve(core: WorkerCore, border: Border) -> None:
    """Run the core until the parent sends ``Stop``: one message per step, asleep while there is nothing to do.

    On a GPU the text of a step is sent while the next one is computed, in a message of its own.
    """
    if core.info.device != "cpu":
        core.stream_during_forward(lambda events: border.send(StepEvents(events, core.stats())))
    while True:
        if not core.has_work:
            border.wait()
        refused: list[RequestEvents] = []
        for message in border.receive():
            match message:
                case Submit():
                    try:
                        core.submit(unpack_request(message))
                    except msgspec.MsgspecError as error:
                        # Answered here, because the core never sees it and its client must get an answer.
                        refusal = RequestError(ErrorKind.REFUSED, f"The engine cannot read this request: {error}.")
                        done = RequestFinished(0, 0, 0, refusal)
                        refused.append(RequestEvents(message.request_id, done=done))
                case Cancel(request_id):
                    core.cancel(request_id)
                case Stop():
                    return
        events = core.step()
        border.send(StepEvents(refused + events, core.stats()))


def build_real_core(config: EngineConfig, progress: Progress) -> WorkerCore:
    """The real core. Imported late, because that takes a moment and the parent gets a sign of life first."""
    from engine.build import build_core

    return build_core(config, progress)


def run(address: str, config: EngineConfig, build: CoreFactory) -> int:
    """Load the model and serve it until asked to stop; returns the exit code."""
    with Border(address) as border:
        border.loading("starting", 0.0)
        try:
            core = _loaded(build, config, border.loading)
            border.send(Ready(core.info))
            with closing(core):
                serve(core, border)
        except ModelRefused as refusal:
            border.send(Refused(str(refusal)))
            return EXIT_REFUSED
        except NOT_FAILURES:
            raise
        except BaseException as error:  # noqa: BLE001 - the process main: whatever ends it, the parent gets the reason
            _log.exception("The engine process ends")
            border.send(Failed(sentence(error)))
            return EXIT_FAILED
    return 0


def _loaded(build: CoreFactory, config: EngineConfig, progress: Progress) -> WorkerCore:
    """The core. What would happen again at each start raises ``ModelRefused``, whatever it is: also a panic of Rust
    code."""
    try:
        return build(config, progress)
    except (ModelRefused, *NOT_FAILURES):
        raise
    except BaseException as error:
        if may_pass(error):
            raise
        _log.exception("The model cannot be loaded")
        raise ModelRefused(f"loading it failed ({sentence(error)}); the log has the trace") from error


def _end_with_parent() -> None:
    """Make sure that this process never outlives its parent, even in the middle of a long step.

    The end of standard input is seen on every system; the kernel's signal (Linux) needs no thread to be scheduled.
    """

    def exit_at_end_of_input() -> None:
        while os.read(0, 1024):
            pass
        os._exit(EXIT_FAILED)

    threading.Thread(target=exit_at_end_of_input, name="parent-watch", daemon=True).start()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(build: CoreFactory = build_real_core) -> None:
    """Entry of the process. ``build`` makes the core."""
    # Terminals and service managers signal the whole group; the parent drains first and then sends ``Stop``.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log = logging.StreamHandler()
    log.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[log])
    logging.captureWarnings(True)
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineConfig)
    _end_with_parent()
    if config.device != "cpu":
        take_memory_in_parts()
    code = run(sys.argv[1], config, build)
    logging.shutdown()
    # A device that has failed can hang the interpreter's own clean-up; all messages are sent and all logs written.
    os._exit(code)


if __name__ == "__main__":
    main()

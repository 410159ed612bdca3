"""The engine as the front end uses it: requests go to a supervised process, events come back as iterators."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from engine.api.engine import EngineConfig, EngineState, Health, ModelInfo
from engine.api.errors import EngineUnavailable, Overloaded, RequestRefused
from engine.api.events import (
    CandidateFinished,
    Delta,
    ErrorKind,
    Event,
    FinishReason,
    RequestError,
    RequestEvents,
    RequestFinished,
)
from engine.api.requests import Request
from engine.process.messages import (
    EXIT_REFUSED,
    Cancel,
    Failed,
    FromWorker,
    Loading,
    Ready,
    Refused,
    StepEvents,
    submit,
)
from engine.process.supervisor import COMMAND, RestartPolicy, WorkerProcess, worker_process

_log = logging.getLogger("castor.engine")


class PendingRequest:
    """A request that the engine has not finished: its events for the reader, and its counts so far."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.abandoned = False
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._tokens = [0] * request.candidates
        self._open = set(range(request.candidates))

    def push(self, events: RequestEvents) -> None:
        """Count a step's events and pass them on to the reader, if there still is one."""
        for delta in events.deltas:
            self._tokens[delta.candidate] += len(delta.token_ids)
        for finished in events.finished:
            self._open.discard(finished.candidate)
        if not self.abandoned:
            self._events.extend(events)
            self._arrived.set()

    async def next(self) -> Event:
        """The next event. Deltas of a candidate that wait for the reader one after the other come as one."""
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        if not isinstance(event, Delta):
            return event
        deltas, kind = [event], (event.candidate, event.thought)
        while self._events and isinstance(following := self._events[0], Delta):
            if (following.candidate, following.thought) != kind:
                break
            deltas.append(following)
            self._events.popleft()
        return event if len(deltas) == 1 else joined(deltas)

    def fail(self, error: RequestError) -> None:
        """End what is still open, with the counts known so far."""
        aborted = tuple(
            CandidateFinished(candidate, FinishReason.ABORTED, self._tokens[candidate])
            for candidate in sorted(self._open)
        )
        done = RequestFinished(len(self.request.prompt), 0, sum(self._tokens), error)
        self.push(RequestEvents(self.request.id, finished=aborted, done=done))


def joined(deltas: Sequence[Delta]) -> Delta:
    """One delta for consecutive ones of a candidate that are all thoughts or all not."""
    return Delta(
        deltas[0].candidate,
        tuple(token_id for delta in deltas for token_id in delta.token_ids),
        "".join(delta.text for delta in deltas),
        tuple(logprobs for delta in deltas for logprobs in delta.logprobs),
        deltas[0].thought,
    )


class EventStream(AsyncIterator[Event]):
    """The events of one request, for one reader. Closed, cancelled or dropped early, it cancels the request."""

    def __init__(self, pending: PendingRequest, abandon: Callable[[PendingRequest], None]) -> None:
        self.pending = pending
        self._abandon = abandon
        self._loop = asyncio.get_running_loop()
        self._ended = False

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        try:
            event = await self.pending.next()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        self._ended = isinstance(event, RequestFinished)
        return event

    async def aclose(self) -> None:
        """Stop listening; does nothing after the last event."""
        if not self._ended:
            self._ended = True
            self._abandon(self.pending)

    def __del__(self) -> None:
        # The collector may run in any thread, and after the loop has been closed.
        if not self._ended:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._abandon, self.pending)


class ProcessEngine:
    """One model in its own process, started again when it dies. Implements ``engine.api.engine.Engine``.

    Belongs to one event loop and never blocks it. ``name`` is for messages. A process that has requests and sends
    nothing for ``stall_seconds`` is killed; so is one that loads and makes no progress for ``load_stall_seconds``,
    which is not started again, because it would read the same files. ``stop_seconds`` bounds each stage of an orderly
    shutdown.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        name: str = "model",
        stall_seconds: float = 120.0,
        load_stall_seconds: float = 900.0,
        stop_seconds: float = 5.0,
        command: tuple[str, ...] = COMMAND,
    ) -> None:
        self.name = name
        self._config = config
        self._stall_seconds = stall_seconds
        self._load_stall_seconds = load_stall_seconds
        self._stop_seconds = stop_seconds
        self._command = command
        self._health = Health(EngineState.STOPPED, "not started")
        self._info: ModelInfo | None = None
        self._pending: dict[str, PendingRequest] = {}
        self._worker: WorkerProcess | None = None
        self._ready_since: float | None = None
        self._trouble = ""  # why its process is started again, until it is ready
        self._alarm: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._settled = asyncio.Event()  # ready, failed or stopped: there is nothing to wait for
        self._settled.set()

    def start(self) -> None:
        """Start loading, in the running event loop; see ``health`` for the progress. Does nothing if started."""
        if self._task is None:
            self._closing.clear()
            self._set_health(state=EngineState.LOADING, detail="starting")
            self._task = asyncio.create_task(self._supervise(), name=f"engine {self.name}")

    async def ready(self) -> ModelInfo:
        """Wait until the model can answer. Raises ``EngineUnavailable`` if it never will."""
        while self._health.state is not EngineState.READY:
            await self._settled.wait()
            if self._health.state in (EngineState.FAILED, EngineState.STOPPED):
                raise EngineUnavailable(self._state_sentence())
        return self.describe()

    def describe(self) -> ModelInfo:
        """What the loaded model can do; still known while its process is started again."""
        if self._info is None:
            raise EngineUnavailable(self._state_sentence())
        return self._info

    def health(self) -> Health:
        return self._health

    def room(self) -> int:
        if self._health.state is not EngineState.READY or self._info is None:
            return 0
        in_flight = sum(pending.request.candidates for pending in self._pending.values())
        return self._info.max_running + self._config.max_waiting - in_flight

    def submit(self, request: Request) -> EventStream:
        """Start a request. Raises ``Overloaded``, ``EngineUnavailable`` or, for an id in use, ``RequestRefused``."""
        worker = self._worker
        if self._health.state is not EngineState.READY or worker is None or self._closing.is_set():
            raise EngineUnavailable(self._state_sentence())
        if request.id in self._pending:
            raise RequestRefused(f"request id {request.id!r} is in use: give every request its own")
        room, limit = self.room(), self.describe().max_running + self._config.max_waiting
        if request.candidates > room:
            raise Overloaded(
                f"The engine of {self.name} has {limit - room} candidates in flight, this request asks for "
                f"{request.candidates} more and the limit is {limit}: try again later."
            )
        try:
            message = submit(request)
        except (TypeError, ValueError) as error:
            raise RequestRefused(f"The request holds a value that cannot be passed on: {error}") from error
        stream = EventStream(PendingRequest(request), self._abandon)
        self._pending[request.id] = stream.pending
        worker.send(message)
        if len(self._pending) == 1:
            self._watch()
        return stream

    def cancel(self, request_id: str) -> None:
        if request_id in self._pending and self._worker is not None:
            self._worker.send(Cancel(request_id))

    async def close(self) -> None:
        """End the process in bounded time, whatever it is doing; requests in flight get their terminal error."""
        self._closing.set()
        self._fail_pending(f"The engine of {self.name} is shutting down.")
        task = self._task
        if task is not None:
            worker = self._worker
            if worker is not None and self._health.state is EngineState.READY:
                await worker.stop(self._stop_seconds)
            elif worker is not None:
                worker.kill("was closed while it loaded")
            await asyncio.wait({task}, timeout=self._stop_seconds)
            task.cancel()
            await asyncio.wait({task})
        self._task = None
        self._info = None
        self._trouble = ""
        self._set_health(state=EngineState.STOPPED, detail="closed")

    def _state_sentence(self) -> str:
        health = self._health
        if self._closing.is_set():
            return f"The engine of {self.name} is shutting down."
        if health.state is EngineState.LOADING:
            return f"The engine of {self.name} is loading ({health.detail}, {health.progress:.0%}): try again soon."
        return f"The engine of {self.name} cannot answer: {health.detail}."

    def _abandon(self, pending: PendingRequest) -> None:
        """Cancel a request that no one reads any more. It counts as pending until the engine has ended it."""
        if self._pending.get(pending.request.id) is pending and not pending.abandoned:
            pending.abandoned = True
            self.cancel(pending.request.id)

    async def _supervise(self) -> None:
        """Keep a process alive until closed, refused or hopeless."""
        policy = RestartPolicy()
        try:
            while True:
                cause = await self._run_process()
                if self._closing.is_set() or self._health.state is EngineState.FAILED:
                    return
                lived = None if self._ready_since is None else time.monotonic() - self._ready_since
                delay = policy.died(lived)
                if delay is None:
                    self._set_health(state=EngineState.FAILED, detail=f"its process {cause}, several times in a row")
                    return
                if policy.deaths > 1:
                    cause += f", {policy.deaths} deaths in a row"
                _log.error("The engine process of %s %s; starting it again in %.0f s", self.name, cause, delay)
                self._trouble = f"its process {cause}, and is started again"
                self._set_health(state=EngineState.LOADING, detail=self._trouble, restarts=self._health.restarts + 1)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), delay)
                if self._closing.is_set():
                    return
        finally:
            if self._health.state is EngineState.LOADING or self._health.state is EngineState.READY:
                self._set_health(state=EngineState.FAILED, detail="it is not supervised any more")

    async def _run_process(self) -> str:
        """Start a process and receive until it has ended; returns why it ended."""
        self._ready_since = None
        config = self._config
        if self._info is not None:
            # "auto" would take the CPU where a GPU is lost.
            config = replace(config, device=self._info.device)
        try:
            async with worker_process(config, self._command) as worker:
                await self._listen(worker)
                return worker.death()
        except OSError as error:
            return f"could not be started ({error})"

    async def _listen(self, worker: WorkerProcess) -> None:
        """Receive all messages of the process until it has ended; then fail the requests that are still pending."""
        self._worker = worker
        try:
            if self._closing.is_set():
                return
            self._watch()
            async for message in worker.messages():
                self._receive(worker, message)
            # What was served before is not refused for its own sake: its device or its memory is gone, and may return.
            if worker.hopeless or (worker.exit_code == EXIT_REFUSED and self._info is None):
                self._set_health(state=EngineState.FAILED, detail=worker.death())
        finally:
            self._worker = None
            # The reason may contain paths: it is for the operator, in the log.
            self._fail_pending(f"The engine of {self.name} ended before the answer was complete: try again soon.")
            self._watch()
            if self._health.state is EngineState.READY:
                self._set_health(
                    state=EngineState.LOADING, detail=f"its process {worker.death()}, and is started again"
                )

    def _receive(self, worker: WorkerProcess, message: FromWorker) -> None:
        match message:
            case StepEvents(events, stats):
                self._health = replace(self._health, stats=stats)
                for step_events in events:
                    pending = self._pending.get(step_events.request_id)
                    if pending is not None:
                        pending.push(step_events)
                        if step_events.done is not None:
                            del self._pending[step_events.request_id]
                self._watch()
            case Loading(stage, fraction):
                detail = f"{stage}; {self._trouble}" if self._trouble else stage
                self._set_health(state=EngineState.LOADING, detail=detail, progress=fraction)
                self._watch()
            case Ready(info):
                self._info = info
                self._trouble = ""
                self._ready_since = time.monotonic()
                self._set_health(state=EngineState.READY, progress=1.0)
                self._watch()
            case Refused(reason):
                worker.ended_because = reason if self._info is None else f"was refused ({reason})"
            case Failed(last_words):
                worker.ended_because = f"failed ({last_words})"

    def _fail_pending(self, sentence: str) -> None:
        failed, self._pending = self._pending, {}
        for pending in failed.values():
            pending.fail(RequestError(ErrorKind.UNAVAILABLE, sentence))

    def _watch(self) -> None:
        """Restart the timer that kills a process which sends nothing while it has requests or loads."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = None
        loop = asyncio.get_running_loop()
        if self._pending:
            self._alarm = loop.call_later(self._stall_seconds, self._stalled)
        elif self._worker is not None and self._health.state is EngineState.LOADING:
            self._alarm = loop.call_later(self._load_stall_seconds, self._load_stalled)

    def _stalled(self) -> None:
        if self._worker is not None:
            self._worker.kill(f"made no progress for {self._stall_seconds:g} s")

    def _load_stalled(self) -> None:
        if self._worker is not None:
            health = self._health
            self._worker.hopeless = True
            self._worker.kill(
                f"its loading ({health.detail}, {health.progress:.0%}) made no progress for "
                f"{self._load_stall_seconds:g} s and was ended"
            )

    def _set_health(
        self, *, state: EngineState, detail: str = "", progress: float = 0.0, restarts: int | None = None
    ) -> None:
        """Enter a state; the statistics of a former process are dropped."""
        restarts = self._health.restarts if restarts is None else restarts
        self._health = Health(state, detail, progress, restarts)
        if state is EngineState.LOADING:
            self._settled.clear()
        else:
            self._settled.set()

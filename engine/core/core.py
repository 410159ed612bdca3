"""The loop: schedule, launch, finish. Every accepted request ends exactly once, whatever happens.

A step launches a batch and finishes it, or, where the host runs a step ahead, the batch that the step before it
launched. On a device that computes asynchronously, the text of older tokens is produced and streamed in between.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from tokenizers import Tokenizer

from engine.api.block_groups import sequence_blocks
from engine.api.engine import EngineConfig, EngineStats
from engine.api.events import ErrorKind, RequestEvents
from engine.api.requests import Request
from engine.api.validation import refusal
from engine.cache.block_pool import BlockPool
from engine.cache.state_slots import StateSlots
from engine.constraints.contracts import Grammars
from engine.core.executor import Executor, InFlight
from engine.core.grammar_queue import GrammarQueue
from engine.core.output import Output
from engine.core.request_state import RequestState, refused
from engine.failures import NOT_FAILURES
from engine.scheduling.chunk_budget import CostOverDecodes, StepCost, StepPacer, most_launched
from engine.scheduling.contracts import Runner, Sampled, Sampler
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import ScheduledChunk
from engine.scheduling.sequence_memory import SequenceMemory

log = logging.getLogger(__name__)

# How many seconds a step waits for a grammar while there is nothing to compute.
GRAMMAR_WAIT = 0.05


class Core:
    """Serves many requests with one runner. Not thread-safe: one caller submits, cancels and steps, then closes.

    ``cost`` models the steps of the device, by default those of a CPU. With ``ahead``, each step is launched before the
    tokens of the one before are read, for runners and samplers that leave them on the device. Deadlines are compared
    with ``clock``, steps are measured with ``timer``, both in seconds. Without ``grammars``, requests that have one are
    refused.
    """

    def __init__(
        self,
        runner: Runner,
        sampler: Sampler,
        tokenizer: Tokenizer,
        config: EngineConfig,
        *,
        cost: StepCost | None = None,
        ahead: bool = False,
        grammars: Grammars | None = None,
        clock: Callable[[], float] = time.monotonic,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.info = runner.info
        self._config = config
        self._clock = clock
        info = runner.info
        launched = most_launched(ahead=ahead)
        for num_blocks, window in info.groups:
            needed = sequence_blocks(window, info.max_context, info.block_size, launched)
            assert num_blocks >= needed, "a pool cannot hold one sequence of the longest context"
        self._pools = [BlockPool(group.num_blocks, info.block_size, group.window) for group in info.groups]
        self._slots = StateSlots(info.max_running, info.num_snapshots) if info.state_bytes else None
        stride = self._pools[0].blocks_for(config.state_stride) * info.block_size
        memory = SequenceMemory(self._pools, launched, self._slots, stride, info.original_context)
        pacer = StepPacer(config.step_target_ms, cost or CostOverDecodes())
        self._scheduler = Scheduler(memory, pacer, info.max_running)
        self._requests: dict[str, RequestState] = {}
        self._output = Output(self._requests, self._scheduler, tokenizer, runner.info)
        self._executor = Executor(runner, sampler, pacer, timer, self._requests, self._output.fail)
        self._grammar_queue = GrammarQueue(grammars) if grammars is not None else None
        self._ahead = ahead
        self._in_flight: list[InFlight] = []
        self._stream: Callable[[list[RequestEvents]], None] | None = None
        self._cancelled: dict[str, None] = {}
        self._refused: list[RequestEvents] = []
        self._steps = 0

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to compute or to return."""
        return bool(self._requests or self._refused)

    def stream_during_forward(self, stream: Callable[[list[RequestEvents]], None]) -> None:
        """Have ``stream`` called within a step, while the device computes, with the events of the previous step.

        For devices that compute asynchronously: turning tokens into text then costs no time. Only tokens that cannot
        end their candidate are deferred; everything else is returned by ``step`` as usual.
        """
        self._stream = stream
        self._output.defers = True

    def submit(self, request: Request) -> None:
        """Take a request. Never raises: the next step returns the refusal of one that cannot be served."""
        problem = refusal(request, self.info, self._config)
        if request.sampling.grammar is not None and self._grammar_queue is None:
            problem = "grammar is given, but this engine follows none; leave it out."
        if request.id in self._requests:
            problem = f"id {request.id!r} belongs to a request in flight; give each request its own."
        if problem:
            self._refused.append(refused(request, problem))
            return
        state = self._requests[request.id] = self._output.open(request)
        if request.sampling.grammar is not None and self._grammar_queue is not None:
            self._grammar_queue.add(state)
        else:
            self._enqueue(state)

    def cancel(self, request_id: str) -> None:
        """End a request with the next step; unknown ids are ignored."""
        if request_id in self._requests:
            self._cancelled[request_id] = None

    def step(self) -> list[RequestEvents]:
        """Advance every running sequence by one chunk; returns what is new, each request once."""
        was_busy = bool(self._requests)
        self._steps += 1
        self._end_expired_and_cancelled()
        self._enqueue_compiled()
        batch = self._scheduler.schedule()
        launched = [self._executor.launch(batch)] if batch else []
        if self._stream is not None and (launched or self._in_flight):
            self._output.feed_deferred()
            if deltas := self._output.take_deltas():
                self._stream(deltas)
        due = self._in_flight + launched
        self._in_flight = [due.pop()] if self._ahead and launched and not launched[0].failed else []
        for in_flight in due:
            for chunk, sampled in self._executor.finish(in_flight, *self._in_flight):
                self._advance(chunk, sampled)
        if not launched or not self._scheduler.has_work:
            self._output.feed_deferred()  # no step follows whose forward could hide this work
        refusals, self._refused = self._refused, []
        events = refusals + self._output.take_events()
        if was_busy and not self._requests:
            self._in_flight = []  # nothing that it computes is needed
            # The last answer waits for this, so blocks are only counted; ``check`` looks at each of them.
            blocks, sequences = self._num_used, self._scheduler.num_running + self._scheduler.num_waiting
            if blocks or sequences:
                log.error("the engine is idle, but %d blocks and %d sequences were not given back", blocks, sequences)
        return events

    def stats(self) -> EngineStats:
        """A snapshot for metrics."""
        compiling = self._grammar_queue.num_candidates if self._grammar_queue else 0
        return EngineStats(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting + compiling,
            used_blocks=self._num_used,
            cached_blocks=sum(pool.num_cached for pool in self._pools),
            total_blocks=sum(pool.num_blocks for pool in self._pools),
            used_slots=self._slots.num_used if self._slots else 0,
            snapshots=self._slots.num_kept if self._slots else 0,
            preemptions=self._scheduler.preemptions,
            steps=self._steps,
            sampled_tokens=self._executor.num_sampled,
            redrawn_tokens=self._executor.num_redrawn,
        )

    def check(self) -> None:
        """Assert the invariants of pool and scheduler; when idle, that nothing of any request is left."""
        self._scheduler.check()
        known = self._scheduler.num_running + self.stats().waiting
        assert known == sum(len(state.open) for state in self._requests.values()), "a sequence was lost"
        if not self._requests:
            assert self._num_used == 0, "a block is held by no sequence"
            assert self.stats().used_slots == 0, "a slot is held by no sequence"
            assert not self._cancelled, "a cancellation outlived its request"

    def close(self) -> None:
        """End the threads for masks and grammars, after the last step. What is in flight gets no further events."""
        self._executor.close()
        if self._grammar_queue is not None:
            self._grammar_queue.close()

    @property
    def _num_used(self) -> int:
        return sum(pool.num_used for pool in self._pools)

    def _end_expired_and_cancelled(self) -> None:
        now = self._clock()
        for state in list(self._requests.values()):
            if state.request.id in self._cancelled:
                self._output.abort(state, ErrorKind.CANCELLED, "The request was cancelled.")
            elif state.request.deadline is not None and state.request.deadline <= now:
                self._output.abort(state, ErrorKind.DEADLINE, "The deadline passed before the answer was complete.")
        self._cancelled.clear()

    def _enqueue_compiled(self) -> None:
        if self._grammar_queue is None:
            return
        for state, problem in self._grammar_queue.take_compiled(0.0 if self._scheduler.has_work else GRAMMAR_WAIT):
            if problem:
                del self._requests[state.request.id]
                self._refused.append(refused(state.request, problem))
            else:
                self._enqueue(state)

    def _enqueue(self, state: RequestState) -> None:
        state.is_enqueued = True
        self._scheduler.add(list(state.open))

    def _advance(self, chunk: ScheduledChunk, sampled: Sampled | None) -> None:
        """Commit a chunk and take its token; a failure of its text or grammar does not affect the rest of the step."""
        state = self._requests[chunk.sequence.request.id]
        if chunk.sequence not in state.open:
            return  # a candidate of the same request failed after this one was computed
        try:
            self._scheduler.commit(chunk)
            if sampled is not None:
                self._output.take(state, chunk.sequence, sampled)
                if sampled.redrawn:
                    chunk.sequence.rewind()
        except NOT_FAILURES:
            raise
        except BaseException as error:  # noqa: BLE001 - the request ends, and the log has the trace
            self._output.fail(chunk.sequence, error)

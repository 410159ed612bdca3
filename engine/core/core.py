"""The loop: schedule, forward, sample, stream, finish; every accepted request ends exactly once, whatever happens."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from engine.api.engine import EngineConfig, EngineStats
from engine.api.errors import EngineUnavailable, RequestRefused
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
from engine.api.validation import refusal
from engine.cache.block_pool import BlockPool
from engine.constraints.contracts import Grammars, Matcher
from engine.constraints.masks import Mask
from engine.core.candidate import Candidate
from engine.failures import NOT_FAILURES
from engine.scheduling.chunk_budget import CostOverDecodes, FittedCost, StepPacer
from engine.scheduling.contracts import Runner, Sampled, Sampler
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import ScheduledChunk, Sequence
from engine.text.detokenizer import Detokenizer, hidden_ids
from engine.text.stops import StopMatcher
from engine.text.streamer import Streamer

log = logging.getLogger(__name__)

# A grammar is bounded before it comes here, but not quick: it must not keep others waiting, nor one that is cancelled.
GRAMMAR_THREADS = 2
GRAMMAR_WAIT = 0.05
MASK_THREADS = 2


class Core:
    """Serves many requests with one runner. Not thread-safe: one caller submits, cancels and steps.

    ``clock`` tells what deadlines are compared with, ``timer`` how long steps take. Without ``grammars``, requests that
    have one are refused.
    """

    def __init__(
        self,
        runner: Runner,
        sampler: Sampler,
        tokenizer: Tokenizer,
        config: EngineConfig,
        *,
        grammars: Grammars | None = None,
        clock: Callable[[], float] = time.monotonic,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.info = runner.info
        self._runner = runner
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._config = config
        self._hidden = hidden_ids(tokenizer)
        self._grammars = grammars
        self._grammar_threads = ThreadPoolExecutor(GRAMMAR_THREADS, thread_name_prefix="grammar")
        self._mask_threads = ThreadPoolExecutor(MASK_THREADS, thread_name_prefix="mask")
        self._clock = clock
        self._timer = timer
        capacity = runner.info.num_blocks * runner.info.block_size
        assert capacity >= runner.info.max_context, "the pool cannot hold one sequence of the longest context"
        self._pool = BlockPool(runner.info.num_blocks, runner.info.block_size)
        cost = CostOverDecodes() if runner.info.device == "cpu" else FittedCost()
        self._pacer = StepPacer(config.step_target_ms, cost)
        self._scheduler = Scheduler(self._pool, self._pacer, runner.info.max_running)
        self._live: dict[str, _Live] = {}
        self._tell_early: Callable[[list[RequestEvents]], None] | None = None
        self._cancelled: dict[str, None] = {}
        self._refused: list[RequestEvents] = []
        self._steps = 0

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to do or to tell."""
        return bool(self._live or self._refused)

    def tell_early(self, tell: Callable[[list[RequestEvents]], None]) -> None:
        """Have ``tell`` called within a step, while the device computes, with what the step before is to tell.

        For devices that compute while this process goes on: making text of tokens then costs no time. Only what cannot
        end a candidate is put off so; the rest is told by ``step`` itself, as without this.
        """
        self._tell_early = tell

    def submit(self, request: Request) -> None:
        """Take a request. Never raises: one that cannot be served is told so by the next step."""
        problem = refusal(request, self.info, self._config)
        if request.sampling.grammar is not None and self._grammars is None:
            problem = "grammar is given, but this engine follows none; leave it out."
        if request.id in self._live:
            problem = f"id {request.id!r} belongs to a request in flight; give each request its own."
        if problem:
            self._refused.append(_refused(request, problem))
            return
        live = self._live[request.id] = _Live(request)
        for number in range(request.candidates):
            sequence = Sequence(request, number, list(request.prompt))
            live.open[sequence] = self._new_candidate(sequence)
        live.first = next(iter(live.open))
        if request.sampling.grammar is None:
            self._scheduler.add(list(live.open))
        else:
            assert self._grammars is not None, "a request with a grammar was let through"
            live.grammar = self._grammar_threads.submit(self._grammars.build, request.sampling.grammar)

    def cancel(self, request_id: str) -> None:
        """End a request with the next step; unknown ids are ignored."""
        if request_id in self._live:
            self._cancelled[request_id] = None

    def step(self) -> list[RequestEvents]:
        """Advance every running sequence by one chunk; returns what there is to tell, each request once."""
        was_busy = bool(self._live)
        self._steps += 1
        self._end_expired_and_cancelled()
        self._queue_whose_grammar_is_built()
        batch = self._scheduler.schedule()
        if batch:
            for chunk, sampled in self._compute(batch):
                self._advance_alone(chunk, sampled)
        if not batch or not self._scheduler.has_work:
            self._make_texts()  # no step follows in which the device would compute meanwhile
        events = self._collect()
        if was_busy and not self._live:
            self._check_when_idle()
        return events

    def stats(self) -> EngineStats:
        """A snapshot for metrics."""
        return EngineStats(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting + sum(len(live.open) for live in self._building()),
            used_blocks=self._pool.num_used,
            cached_blocks=self._pool.num_cached,
            total_blocks=self._pool.num_blocks,
            preemptions=self._scheduler.preemptions,
            steps=self._steps,
        )

    def check(self) -> None:
        """Assert the invariants of pool and scheduler; when idle, that nothing of any request is left."""
        self._scheduler.check()
        known = self._scheduler.num_running + self.stats().waiting
        assert known == sum(len(live.open) for live in self._live.values()), "a sequence was lost"
        if not self._live:
            assert self._pool.num_used == 0, "a block is held by nobody"
            assert not self._cancelled, "a cancellation outlived its request"

    def _end_expired_and_cancelled(self) -> None:
        now = self._clock()
        for live in list(self._live.values()):
            if live.request.id in self._cancelled:
                self._end_early(live, ErrorKind.CANCELLED, "The request was cancelled.")
            elif live.request.deadline is not None and live.request.deadline <= now:
                self._end_early(live, ErrorKind.DEADLINE, "The deadline passed before the answer was complete.")
        self._cancelled.clear()

    def _new_candidate(self, sequence: Sequence) -> Candidate:
        sampling = sequence.request.sampling
        detokenizer = Detokenizer(self._tokenizer, self._hidden.difference(sampling.markers))
        streamer = Streamer(detokenizer, StopMatcher(sampling.stop, sampling.stop_exempt))
        return Candidate(sequence, streamer, self.info.vocab_size)

    def _building(self) -> list[_Live]:
        return [live for live in self._live.values() if live.grammar is not None]

    def _queue_whose_grammar_is_built(self) -> None:
        building = self._building()
        if building and not self._scheduler.has_work:
            wait([live.grammar for live in building if live.grammar], GRAMMAR_WAIT, FIRST_COMPLETED)
        for live in building:
            if live.grammar is not None and live.grammar.done():
                self._queue_with(live, live.grammar)

    def _queue_with(self, live: _Live, grammar: Future[Matcher]) -> None:
        live.grammar = None
        try:
            matcher = grammar.result()
            for candidate in live.open.values():
                candidate.constrain(matcher.copy())
        except NOT_FAILURES:
            raise
        except BaseException as error:
            log.warning("request %s has a grammar that cannot be built", live.request.id, exc_info=error)
            known = isinstance(error, RequestRefused)
            del self._live[live.request.id]
            self._refused.append(_refused(live.request, str(error) if known else "grammar cannot be compiled."))
        else:
            self._scheduler.add(list(live.open))

    def _compute(self, batch: list[ScheduledChunk]) -> list[tuple[ScheduledChunk, Sampled | None]]:
        """Run a batch; if it fails, each chunk alone, so that only the request that cannot be computed ends."""
        try:
            return self._run(batch)
        except (EngineUnavailable, *NOT_FAILURES):
            raise  # the device is lost: no retry can help, and whoever drives the core must start anew
        except BaseException as error:
            self._runner.check()  # a lost device fails with any error, and then with every chunk that is tried alone
            if len(batch) == 1:
                self._fail(batch[0].sequence, error)
                return []
            log.warning("a step of %d sequences failed, each is tried alone", len(batch), exc_info=error)
        return [result for chunk in batch if self._is_open(chunk.sequence) for result in self._compute([chunk])]

    def _run(self, batch: list[ScheduledChunk]) -> list[tuple[ScheduledChunk, Sampled | None]]:
        started = self._timer()
        sampling = [chunk.sequence for chunk in batch if chunk.samples]
        masks = [self._start_mask(sequence) for sequence in sampling]
        try:
            logits = self._runner.forward(batch)
            self._tell_meanwhile()
        finally:
            wait(filter(None, masks))  # whatever happens: a matcher is not for two threads
        allowed = [mask.result() if mask else None for mask in masks]
        sampled = self._sampler.sample(logits, sampling, allowed) if sampling else []
        # The device may lag behind forward; the sampled tokens are what has to be waited for.
        self._record(batch, self._timer() - started)
        token_of = dict(zip(sampling, sampled, strict=True))
        return [(chunk, token_of.get(chunk.sequence)) for chunk in batch]

    def _tell_meanwhile(self) -> None:
        """What the step before has to tell, while the device computes this one."""
        if self._tell_early is None:
            return
        self._make_texts()
        told = [live.take_events() for live in self._live.values() if live.deltas and not live.done]
        if told:
            self._tell_early(told)

    def _make_texts(self) -> None:
        for live in [live for live in self._live.values() if live.put_off]:
            self._make_text(live)

    def _make_text(self, live: _Live) -> None:
        """Feed the candidates of a request with the tokens that were put off; if one fails, the request ends."""
        put_off, live.put_off = live.put_off, []
        for place, (sequence, sampled) in enumerate(put_off):
            try:
                live.deltas += live.open[sequence].feed(sampled)
            except NOT_FAILURES:
                raise
            except BaseException as error:  # noqa: BLE001 - the log has the trace
                for untold, _ in put_off[place:]:
                    untold.tokens.pop()  # only what was told counts
                self._fail(sequence, error)
                return

    def _start_mask(self, sequence: Sequence) -> Future[Mask | None] | None:
        """Have a mask computed while the model runs, if the candidate needs one."""
        candidate = self._live[sequence.request.id].open[sequence]
        return self._mask_threads.submit(candidate.mask) if candidate.is_constrained else None

    def _record(self, batch: list[ScheduledChunk], seconds: float) -> None:
        # A prompt's last token alone costs what a decode costs.
        prefill = [chunk.num_tokens for chunk in batch if chunk.num_tokens > 1]
        self._pacer.record(len(batch) - len(prefill), sum(prefill), seconds)

    def _advance_alone(self, chunk: ScheduledChunk, sampled: Sampled | None) -> None:
        """Whatever a candidate's text or grammar does, the others of the step have their tokens."""
        try:
            self._advance(chunk, sampled)
        except NOT_FAILURES:
            raise
        except BaseException as error:  # noqa: BLE001 - the request ends, and the log has the trace
            self._fail(chunk.sequence, error)

    def _advance(self, chunk: ScheduledChunk, sampled: Sampled | None) -> None:
        if not self._is_open(chunk.sequence):
            return  # a candidate of the same request failed after this one was computed
        self._scheduler.commit(chunk)
        if sampled is not None:
            self._take(chunk.sequence, sampled)

    def _is_open(self, sequence: Sequence) -> bool:
        return sequence in self._live[sequence.request.id].open

    def _take(self, sequence: Sequence, sampled: Sampled) -> None:
        """Add a token to a candidate; tell its text; end the candidate if that was its last."""
        live = self._live[sequence.request.id]
        candidate = live.open[sequence]
        reason = candidate.reason  # known since its mask was computed: then the token means nothing
        if reason is None and sampled.token_id in sequence.request.sampling.stop_ids:
            reason = FinishReason.STOP
        elif reason is None and self._tell_early is not None and candidate.ends_by_tokens:
            live.put_off.append((sequence, sampled))
            sequence.tokens.append(sampled.token_id)
            reason = self._limit_of(sequence)
        elif reason is None:
            live.deltas += candidate.feed(sampled)
            sequence.tokens.append(sampled.token_id)
            reason = candidate.reason or self._limit_of(sequence)
        if reason:
            self._make_text(live)
            if not self._is_open(sequence):
                return  # its text could not be made
            live.deltas += candidate.flush()
            # The rest of the text may have completed a stop string.
            self._close(live, sequence, candidate.reason or reason)
            if not live.open:
                self._end(live)

    def _limit_of(self, sequence: Sequence) -> FinishReason | None:
        most = sequence.request.sampling.max_tokens
        if sequence.num_sampled >= most or len(sequence.tokens) >= self.info.max_context:
            return FinishReason.MAX_TOKENS
        return None

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        live = self._live[sequence.request.id]
        log.error("request %s failed in a step", live.request.id, exc_info=error)
        self._end_early(live, ErrorKind.INTERNAL, "The engine could not compute this request; the log has the details.")

    def _end_early(self, live: _Live, kind: ErrorKind, message: str) -> None:
        self._make_text(live)
        if not live.done:
            self._abort(live, kind, message)

    def _abort(self, live: _Live, kind: ErrorKind, message: str) -> None:
        for sequence in list(live.open):
            self._close(live, sequence, FinishReason.ABORTED)
        self._end(live, RequestError(kind, message))

    def _close(self, live: _Live, sequence: Sequence, reason: FinishReason) -> None:
        candidate = live.open.pop(sequence)
        if live.grammar is None:
            self._scheduler.remove(sequence)
        live.candidate_tokens += sequence.num_sampled
        live.thought_tokens += candidate.num_thoughts
        message = candidate.message if reason is FinishReason.MALFORMED else ""
        live.finished.append(
            CandidateFinished(sequence.candidate, reason, sequence.num_sampled, candidate.num_thoughts, message)
        )

    def _end(self, live: _Live, error: RequestError | None = None) -> None:
        request = live.request
        if live.grammar is not None:
            live.grammar.cancel()
            live.grammar = None
        live.done = RequestFinished(
            len(request.prompt), live.first.num_cached, live.candidate_tokens, error, live.thought_tokens
        )

    def _collect(self) -> list[RequestEvents]:
        events, self._refused = self._refused, []
        for live in list(self._live.values()):
            if live.deltas or live.finished:
                events.append(live.take_events())
            if live.done:
                del self._live[live.request.id]
        return events

    def _check_when_idle(self) -> None:
        # The last answer waits for this, so it only counts; ``check`` looks at every block.
        blocks, sequences = self._pool.num_used, self._scheduler.num_running + self._scheduler.num_waiting
        if blocks or sequences:
            log.error("the engine is idle, but %d blocks and %d sequences were not given back", blocks, sequences)


@dataclass(slots=True, eq=False)
class _Live:
    """A request in flight: its open candidates, its totals, and what the current step has to tell about it."""

    request: Request
    open: dict[Sequence, Candidate] = field(default_factory=dict)
    first: Sequence = field(init=False)
    grammar: Future[Matcher] | None = None  # while it is built; the request is not queued until then
    candidate_tokens: int = 0
    thought_tokens: int = 0
    put_off: list[tuple[Sequence, Sampled]] = field(default_factory=list)  # tokens whose text is not made yet
    deltas: list[Delta] = field(default_factory=list)
    finished: list[CandidateFinished] = field(default_factory=list)
    done: RequestFinished | None = None

    def take_events(self) -> RequestEvents:
        events = RequestEvents(self.request.id, tuple(self.deltas), tuple(self.finished), self.done)
        self.deltas, self.finished = [], []
        return events


def _refused(request: Request, problem: str) -> RequestEvents:
    done = RequestFinished(len(request.prompt), 0, 0, RequestError(ErrorKind.REFUSED, problem))
    return RequestEvents(request.id, done=done)

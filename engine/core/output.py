"""Turns sampled tokens into events: the text of candidates, and the ends of candidates and requests."""

from __future__ import annotations

import logging

from tokenizers import Tokenizer

from engine.api.engine import ModelInfo
from engine.api.errors import OutOfMemory
from engine.api.events import ErrorKind, FinishReason, RequestError, RequestEvents
from engine.api.requests import Request
from engine.core.candidate import Candidate
from engine.core.request_state import RequestState
from engine.failures import NOT_FAILURES
from engine.scheduling.contracts import Sampled
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from engine.text.detokenizer import Detokenizer, TokenTexts, hidden_ids
from engine.text.stops import StopMatcher
from engine.text.streamer import Streamer

log = logging.getLogger(__name__)


class Output:
    """Feeds candidates their tokens, and ends them; ``requests`` are those in flight, by id.

    With ``defers``, the text of tokens that cannot end their candidate is produced only by ``feed_deferred``, which
    the loop calls while the device computes the next step.
    """

    def __init__(
        self, requests: dict[str, RequestState], scheduler: Scheduler, tokenizer: Tokenizer, info: ModelInfo
    ) -> None:
        self.defers = False
        self._requests = requests
        self._scheduler = scheduler
        self._texts = TokenTexts(tokenizer)
        self._hidden = hidden_ids(tokenizer)
        self._info = info

    def open(self, request: Request) -> RequestState:
        """The state of a request, with its candidates before their first token."""
        sampling, candidates = request.sampling, {}
        for number in range(request.candidates):
            sequence = Sequence(request, number, list(request.prompt))
            detokenizer = Detokenizer(self._texts, self._hidden.difference(sampling.markers))
            streamer = Streamer(detokenizer, StopMatcher(sampling.stop, sampling.stop_exempt))
            candidate = candidates[sequence] = Candidate(sequence, streamer, self._info.vocab_size)
            sequence.most_tokens = min(len(request.prompt) + sampling.max_tokens, self._info.max_context)
            sequence.runs_ahead = len(request.prompt) + 1 < sequence.most_tokens and not candidate.needs_last_token
        return RequestState(request, candidates)

    def take(self, state: RequestState, sequence: Sequence, sampled: Sampled) -> None:
        """Add a token to an open candidate; end the candidate if that was its last."""
        candidate, token_id = state.open[sequence], sampled.token_id
        # A reason may be known since its mask was computed: then the token means nothing.
        reason = None if candidate.is_deferrable else candidate.reason
        if reason is None and token_id in sequence.request.sampling.stop_ids:
            reason = FinishReason.STOP
        elif reason is None:
            if self.defers and candidate.is_deferrable:
                state.deferred.append((sequence, sampled))
            else:
                state.deltas += candidate.feed(sampled)
                reason = candidate.reason
            sequence.tokens.append(token_id)
            tokens_left = sequence.most_tokens - len(sequence.tokens)
            sequence.runs_ahead = tokens_left > 1 and not candidate.needs_last_token
            if reason is None and tokens_left <= 0:
                reason = FinishReason.MAX_TOKENS
        if reason is None:
            return
        self._feed_deferred_of(state)
        if sequence in state.open:  # producing its text did not fail
            state.deltas += candidate.flush()
            # The rest of the text may have completed a stop string.
            self._close(state, sequence, candidate.reason or reason)
            if not state.open:
                state.finish()

    def feed_deferred(self) -> None:
        """Produce the text of all deferred tokens."""
        for state in [state for state in self._requests.values() if state.deferred]:
            self._feed_deferred_of(state)

    def fail(self, sequence: Sequence, error: BaseException) -> None:
        """End the request of a sequence whose step or text failed."""
        state = self._requests[sequence.request.id]
        log.error("request %s failed in a step", state.request.id, exc_info=error)
        unknown = "The engine could not compute this request; the log has the details."
        self.abort(state, ErrorKind.INTERNAL, str(error) if isinstance(error, OutOfMemory) else unknown)

    def abort(self, state: RequestState, kind: ErrorKind, message: str) -> None:
        """End a request with all its candidates; the text of its tokens is still produced."""
        self._feed_deferred_of(state)
        if not state.done:
            for sequence in list(state.open):
                self._close(state, sequence, FinishReason.ABORTED)
            state.finish(RequestError(kind, message))

    def take_deltas(self) -> list[RequestEvents]:
        """What is new in the requests that are not done."""
        return [state.take_events() for state in self._requests.values() if state.deltas and not state.done]

    def take_events(self) -> list[RequestEvents]:
        """What is new in all requests; those that are done are removed."""
        events = []
        for state in list(self._requests.values()):
            if state.deltas or state.finished:
                events.append(state.take_events())
            if state.done:
                del self._requests[state.request.id]
        return events

    def _feed_deferred_of(self, state: RequestState) -> None:
        """Feed the candidates of a request with their deferred tokens; if one fails, the request ends."""
        deferred, state.deferred = state.deferred, []
        for place, (sequence, sampled) in enumerate(deferred):
            try:
                state.deltas += state.open[sequence].feed(sampled)
            except NOT_FAILURES:
                raise
            except BaseException as error:  # noqa: BLE001 - the log has the trace
                for unfed, _ in deferred[place:]:
                    unfed.tokens.pop()  # only tokens that are in a delta count
                self.fail(sequence, error)
                return

    def _close(self, state: RequestState, sequence: Sequence, reason: FinishReason) -> None:
        state.close(sequence, reason)
        if state.is_enqueued:
            self._scheduler.remove(sequence)

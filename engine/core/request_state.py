"""One request in flight: its open candidates, what is new since its last events, and its totals."""

from __future__ import annotations

from dataclasses import dataclass, field

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
from engine.core.candidate import Candidate
from engine.scheduling.contracts import Sampled
from engine.scheduling.sequence import Sequence


@dataclass(slots=True, eq=False)
class RequestState:
    """A request from the moment it is accepted until its last event is taken.

    ``open`` are the candidates that have not ended, ``first`` is the sequence of candidate 0. ``deferred`` are sampled
    tokens, in order, without their text yet. ``deltas`` and ``finished`` are what is new since ``take_events``.
    """

    request: Request
    open: dict[Sequence, Candidate]
    first: Sequence = field(init=False)
    is_enqueued: bool = False  # whether the scheduler has its sequences: not before its grammar is compiled
    candidate_tokens: int = 0
    thought_tokens: int = 0
    deferred: list[tuple[Sequence, Sampled]] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    finished: list[CandidateFinished] = field(default_factory=list)
    done: RequestFinished | None = None

    def __post_init__(self) -> None:
        self.first = next(iter(self.open))

    def close(self, sequence: Sequence, reason: FinishReason) -> None:
        """End one open candidate and count its tokens."""
        candidate = self.open.pop(sequence)
        self.candidate_tokens += sequence.num_sampled
        self.thought_tokens += candidate.num_thoughts
        message = candidate.message if reason is FinishReason.MALFORMED else ""
        self.finished.append(
            CandidateFinished(sequence.candidate, reason, sequence.num_sampled, candidate.num_thoughts, message)
        )

    def finish(self, error: RequestError | None = None) -> None:
        """End the request, whose candidates are all closed."""
        self.done = RequestFinished(
            len(self.request.prompt), self.first.num_cached_tokens, self.candidate_tokens, error, self.thought_tokens
        )

    def take_events(self) -> RequestEvents:
        """What is new since the last call."""
        events = RequestEvents(self.request.id, tuple(self.deltas), tuple(self.finished), self.done)
        self.deltas, self.finished = [], []
        return events


def refused(request: Request, problem: str) -> RequestEvents:
    """The only events of a request that cannot be served."""
    done = RequestFinished(len(request.prompt), 0, 0, RequestError(ErrorKind.REFUSED, problem))
    return RequestEvents(request.id, done=done)

"""What an engine answers with: the events of a request.

One request yields, in this order within every step: ``Delta`` for each candidate that grew, one
``CandidateFinished`` for each candidate that ended, and, exactly once and last, ``RequestFinished``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

# --- Events --------------------------------------------------------------------------------------


class FinishReason(StrEnum):
    """Why a candidate ended."""

    STOP = "stop"  # an end token or a stop sequence
    MAX_TOKENS = "max_tokens"  # its own limit, or the end of the model's context
    MALFORMED = "malformed"  # the grammar could not be followed to its end; the message names the limit that was hit
    ABORTED = "aborted"  # cancelled, expired or failed: the request's error says which


class TopLogprob(NamedTuple):
    """One alternative of a decoding step; the natural logarithm of its raw probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Raw log-probabilities (before temperature, penalties and masks) of one sampled token, ``top`` descending."""

    chosen: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(slots=True)  # not frozen, which would double what it costs to make one for each token
class Delta:
    """What a step added to one candidate.

    ``text`` may lag behind ``token_ids``: incomplete characters and the possible beginning of a stop sequence are
    held back. ``logprobs`` has one entry per token id, or is empty if none were asked for. ``thought`` is true for
    thoughts and the markers around them.
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


@dataclass(slots=True)  # not frozen: see ``Delta``
class RequestEvents:
    """Everything that happened to one request in one step, in the order in which it is to be reported."""

    request_id: str
    deltas: tuple[Delta, ...] = ()
    finished: tuple[CandidateFinished, ...] = ()
    done: RequestFinished | None = None

    def __iter__(self) -> Iterator[Event]:
        yield from self.deltas
        yield from self.finished
        if self.done is not None:
            yield self.done

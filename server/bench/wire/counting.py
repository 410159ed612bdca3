"""How many tokens an answer has and when they arrived, from the events of its stream."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from server.bench.wire.protocols import Progress


@dataclass(slots=True)
class Outcome:
    """The outcome of one request. Times are seconds since the load began; ``intended`` is when it was due.

    ``gaps`` are the pauses between two arrivals of text after the first, each with the number of tokens that ended it.
    ``counted_by`` is "usage" where the server reported the number of tokens, "chunks" where the chunks were counted.
    """

    intended: float
    sent: float = 0.0
    first: float | None = None
    ended: float = 0.0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int = 0
    finish_reason: str | None = None
    counted_by: str = "chunks"
    cancelled: bool = False
    error: str | None = None
    gaps: list[tuple[float, float]] = field(default_factory=list)

    @property
    def succeeded(self) -> bool:
        """Whether the answer is complete."""
        return self.error is None and not self.cancelled


class TokenCounter:
    """Follows one stream and fills its outcome.

    Servers that report the running total with each chunk (Gemini) give exact gaps. For the others a chunk with text
    counts as one token until the total at the end gives the mean number of tokens per chunk.
    """

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._chunks = 0
        self._total: int | None = None
        self._running = False
        self._counted = 0
        self._last = 0.0

    def take(self, events: Iterable[Progress], now: float) -> None:
        """Record what arrived together at the time ``now``."""
        has_text = False
        for event in events:
            has_text |= event.has_text
            self._chunks += event.has_text
            self._note(event)
        if not has_text:
            return
        count = self._total if self._running and self._total is not None else self._chunks
        if self._outcome.first is None:
            self._outcome.first = now
        else:
            # Text without a further token is the rest of one that came before.
            self._outcome.gaps.append((now - self._last, max(count - self._counted, 0)))
        self._counted, self._last = count, now

    def settle(self) -> None:
        """The stream has ended, or is no longer read."""
        outcome = self._outcome
        if self._total is None:
            outcome.output_tokens = self._chunks
            return
        outcome.output_tokens, outcome.counted_by = self._total, "usage"
        if not self._running and self._chunks:
            share = self._total / self._chunks
            outcome.gaps = [(seconds, chunks * share) for seconds, chunks in outcome.gaps]

    def _note(self, event: Progress) -> None:
        outcome = self._outcome
        if event.output_tokens is not None:
            self._total = event.output_tokens
            self._running |= event.has_text
        outcome.prompt_tokens = outcome.prompt_tokens if event.prompt_tokens is None else event.prompt_tokens
        outcome.cached_tokens = outcome.cached_tokens if event.cached_tokens is None else event.cached_tokens
        outcome.finish_reason = event.finish_reason or outcome.finish_reason
        outcome.error = event.error or outcome.error

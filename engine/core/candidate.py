"""One candidate while it lives: which tokens it may take next, and what each token that it took has to tell."""

from __future__ import annotations

from collections.abc import Iterator

from engine.api.events import Delta, FinishReason
from engine.api.requests import Thinking
from engine.constraints import masks
from engine.constraints.contracts import Matcher
from engine.constraints.masks import Mask
from engine.core.thinking import Thoughts
from engine.scheduling.contracts import Sampled
from engine.scheduling.sequence import Sequence
from engine.text.streamer import Streamer

_NO_THINKING = Thinking((), ())


class Candidate:
    """Follows a sequence's sampled tokens: through its thoughts, then through its answer's grammar, to text.

    Tokens that may be the head of a start marker are held back until it is known what they are. The matcher takes them
    meanwhile as long as its grammar allows them, and begins anew when they turn out to begin thoughts.
    """

    def __init__(self, sequence: Sequence, streamer: Streamer, vocab_size: int) -> None:
        sampling = sequence.request.sampling
        self._sequence = sequence
        self._streamer = streamer
        self._vocab_size = vocab_size
        self._stop_ids = sampling.stop_ids
        self._thoughts = Thoughts(sampling.thinking or _NO_THINKING, constrained=sampling.grammar is not None)
        self._tells_thoughts = self._thoughts.inside
        self._held: list[Sampled] = []
        self._matcher: Matcher | None = None
        self._astray = False
        self._stuck = False

    @property
    def num_thoughts(self) -> int:
        return self._thoughts.count

    @property
    def is_constrained(self) -> bool:
        """Whether ``mask`` may rule out any token."""
        return self._matcher is not None or self._thoughts.forced is not None

    @property
    def is_deferrable(self) -> bool:
        """Whether nothing in the text, a grammar or thoughts can end it or say what comes next."""
        sampling = self._sequence.request.sampling
        return not sampling.stop and sampling.grammar is None and sampling.thinking is None

    @property
    def reason(self) -> FinishReason | None:
        """Why the candidate cannot go on, if so."""
        if self._streamer.stopped:
            return FinishReason.STOP
        if self._stuck:
            return FinishReason.MALFORMED
        if self._matcher is None or self._thoughts.inside or not self._matcher.stopped:
            return None
        return FinishReason.STOP if self._matcher.accepting else FinishReason.MALFORMED

    @property
    def message(self) -> str:
        """What stood in the grammar's way, where the reason to end is that it could not be followed."""
        error = self._matcher.error if self._matcher is not None else ""
        return f"The answer's grammar could not be followed to its end: {error or 'no token continues it.'}"

    def constrain(self, matcher: Matcher) -> None:
        """Let the answer follow a grammar, from its beginning."""
        self._matcher = matcher

    def mask(self) -> Mask | None:
        """Which tokens may come next, None for all; or None where the candidate turns out to have a reason to end."""
        mask = self._allowed()
        self._stuck = mask is not None and masks.is_empty(mask)
        return None if self._stuck else mask

    def feed(self, sampled: Sampled) -> list[Delta]:
        """Take the next token, which is none of the stop ids; returns what can be told now."""
        thoughts, was_inside = self._thoughts, self._thoughts.inside
        thoughts.feed(sampled.token_id)
        self._held.append(sampled)
        if was_inside or thoughts.inside:
            if self._matcher is not None and not was_inside:
                self._matcher.restart()
                self._astray = False
            return list(self._release(len(self._held), thought=True))
        if self._matcher is not None:
            self._match(self._matcher, sampled.token_id)
        return list(self._release(len(self._held) - thoughts.held, thought=False))

    def flush(self) -> list[Delta]:
        """What was held back, at the candidate's end."""
        return [*self._release(len(self._held), thought=False), *self._flush_text()]

    def _allowed(self) -> Mask | None:
        thoughts, matcher = self._thoughts, self._matcher
        if thoughts.forced is not None:
            return masks.only([thoughts.forced], self._vocab_size)
        if matcher is None:
            return None
        if thoughts.inside:
            return masks.all_but(self._stop_ids, self._vocab_size)  # an answer has to follow
        opening = [] if thoughts.opening is None else [thoughts.opening]
        if self._astray:
            return masks.only(opening, self._vocab_size)
        mask = matcher.mask()
        if matcher.stopped:
            return None
        return masks.also(mask, [*opening, *self._stop_ids] if matcher.accepting else opening)

    def _match(self, matcher: Matcher, token_id: int) -> None:
        if self._thoughts.held and (self._astray or not matcher.allows(token_id)):
            self._astray = True  # the head of a start marker, which the mask lets go on to its end alone
        else:
            matcher.consume(token_id)

    def _release(self, count: int, *, thought: bool) -> Iterator[Delta]:
        if not count:
            return
        if thought != self._tells_thoughts:
            yield from self._flush_text()
            self._tells_thoughts = thought
        told, self._held = self._held[:count], self._held[count:]
        text = "".join(self._streamer.feed(sampled.token_id, thought=thought) for sampled in told)
        logprobs = tuple(sampled.logprobs for sampled in told if sampled.logprobs is not None)
        token_ids = tuple(sampled.token_id for sampled in told)
        yield Delta(self._sequence.candidate, token_ids, text, logprobs, thought)

    def _flush_text(self) -> Iterator[Delta]:
        if text := self._streamer.flush(thought=self._tells_thoughts):
            yield Delta(self._sequence.candidate, (), text, (), self._tells_thoughts)

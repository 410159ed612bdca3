"""One open candidate: which tokens may come next, and what each sampled token adds to its text."""

from __future__ import annotations

from collections.abc import Iterator

from engine.api.events import Delta, FinishReason
from engine.api.sampling import Thinking
from engine.constraints import masks
from engine.constraints.contracts import Matcher
from engine.constraints.masks import Mask
from engine.core.thinking import Thoughts
from engine.scheduling.contracts import Sampled
from engine.scheduling.sequence import Sequence
from engine.text.streamer import Streamer

_NO_THINKING = Thinking((), ())


class Candidate:
    """Follows a sequence's sampled tokens through its thoughts and its answer's grammar, and turns them into text.

    Tokens that may be the beginning of a start marker are held back until it is known what they are. Meanwhile the
    matcher consumes them as long as its grammar allows them, and restarts if they turn out to begin thoughts. Held
    tokens that the grammar does not allow can only continue to the end of the marker: ``_off_grammar``.
    """

    def __init__(self, sequence: Sequence, streamer: Streamer, vocab_size: int) -> None:
        sampling = sequence.request.sampling
        self._sequence = sequence
        self._streamer = streamer
        self._vocab_size = vocab_size
        self._stop_ids = sampling.stop_ids
        self._thoughts = Thoughts(sampling.thinking or _NO_THINKING, constrained=sampling.grammar is not None)
        self._text_is_thought = self._thoughts.inside
        self._held: list[Sampled] = []
        # Text and nothing else: each token is released as it comes.
        self._is_plain = sampling.grammar is None and sampling.thinking is None
        # No grammar, thought or stop string decides about the next token, so text can be produced later.
        self.is_deferrable = self._is_plain and not sampling.stop
        self._matcher: Matcher | None = None
        self._off_grammar = False
        self._dead_end = False

    @property
    def num_thoughts(self) -> int:
        return self._thoughts.count

    @property
    def is_constrained(self) -> bool:
        """Whether ``mask`` may rule out any token."""
        return not self._is_plain and (self._matcher is not None or self._thoughts.forced is not None)

    @property
    def needs_last_token(self) -> bool:
        """Whether the next token may depend on the one before it by more than its logits: on a grammar, or on a budget
        for thoughts that is nearly spent."""
        return not self._is_plain and (self._sequence.request.sampling.grammar is not None or self._thoughts.may_force)

    @property
    def reason(self) -> FinishReason | None:
        """Why the candidate must end; None while it continues."""
        if self._streamer.stopped:
            return FinishReason.STOP
        if self._dead_end:
            return FinishReason.MALFORMED
        if self._matcher is None or self._thoughts.inside or not self._matcher.stopped:
            return None
        return FinishReason.STOP if self._matcher.accepting else FinishReason.MALFORMED

    @property
    def message(self) -> str:
        """Why the grammar could not be followed to its end, for candidates that end as malformed."""
        error = self._matcher.error if self._matcher is not None else ""
        return f"The answer's grammar could not be followed to its end: {error or 'no token continues it.'}"

    def constrain(self, matcher: Matcher) -> None:
        """Let the answer follow a grammar, from its beginning."""
        self._matcher = matcher

    def mask(self) -> Mask | None:
        """Which tokens may come next. None for all, and if the candidate turns out to have a reason to end."""
        mask = self._allowed()
        self._dead_end = mask is not None and masks.is_empty(mask)
        return None if self._dead_end else mask

    def feed(self, sampled: Sampled) -> list[Delta]:
        """Take the next token, which is not a stop id; returns what is new since the last token."""
        if self._is_plain:
            text = self._streamer.feed(sampled.token_id)
            logprobs = () if sampled.logprobs is None else (sampled.logprobs,)
            return [Delta(self._sequence.candidate, (sampled.token_id,), text, logprobs, False)]
        thoughts, was_inside = self._thoughts, self._thoughts.inside
        thoughts.feed(sampled.token_id)
        self._held.append(sampled)
        if was_inside or thoughts.inside:
            if self._matcher is not None and not was_inside:
                self._matcher.restart()
                self._off_grammar = False
            return list(self._release(len(self._held), thought=True))
        if self._matcher is not None:
            if thoughts.held and (self._off_grammar or not self._matcher.allows(sampled.token_id)):
                self._off_grammar = True  # the beginning of a start marker: the mask allows only the rest of it
            else:
                self._matcher.consume(sampled.token_id)
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
        if self._off_grammar:
            return masks.only(opening, self._vocab_size)
        mask = matcher.mask()
        if matcher.stopped:
            return None
        return masks.also(mask, [*opening, *self._stop_ids] if matcher.accepting else opening)

    def _release(self, count: int, *, thought: bool) -> Iterator[Delta]:
        if not count:
            return
        if thought != self._text_is_thought:
            yield from self._flush_text()
            self._text_is_thought = thought
        released, self._held = self._held[:count], self._held[count:]
        text = "".join(self._streamer.feed(sampled.token_id, thought=thought) for sampled in released)
        logprobs = tuple(sampled.logprobs for sampled in released if sampled.logprobs is not None)
        token_ids = tuple(sampled.token_id for sampled in released)
        yield Delta(self._sequence.candidate, token_ids, text, logprobs, thought)

    def _flush_text(self) -> Iterator[Delta]:
        if text := self._streamer.flush(thought=self._text_is_thought):
            yield Delta(self._sequence.candidate, (), text, (), self._text_is_thought)

"""What the scheduler asks of the runner and what comes back: sequences, work, sampled tokens. No torch."""

from __future__ import annotations

from array import array
from collections.abc import MutableSequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from engine.masks import Mask
from engine.types import ModelInfo, Request, TokenLogprobs


@dataclass(slots=True, eq=False)
class Sequence:
    """One candidate of one request while it lives in the engine.

    ``tokens`` is the prompt followed by the sampled tokens. The keys and values of the first ``num_computed`` of
    them lie in ``blocks``: token ``i`` in slot ``i % block_size`` of ``blocks[i // block_size]``. In an engine that is
    an array, because each step copies it whole, and from a list that takes milliseconds where contexts are long.
    """

    request: Request
    candidate: int
    tokens: list[int]
    num_computed: int = 0
    num_cached: int = 0
    blocks: MutableSequence[int] = field(default_factory=lambda: array("i"))

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_sampled(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def sampled(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]


class Work(NamedTuple):
    """Compute the tokens ``[start, start + num_tokens)`` of a sequence; their blocks are allocated."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether this work ends at the last known token, so that the next one is sampled from its logits."""
        return self.start + self.num_tokens == len(self.sequence.tokens)


class Sampled(NamedTuple):
    """The next token of a sequence; ``logprobs`` only where the request asked for them."""

    token_id: int
    logprobs: TokenLogprobs | None


class Runner(Protocol):
    """Computes a batch. Writes the keys and values of all its tokens into the pages."""

    info: ModelInfo

    def forward(self, batch: list[Work]) -> Any:
        """Logits, one row for each work that samples, in the batch's order: float [rows, vocabulary].

        May return before the device is done; where nothing samples it waits, because the time of each step is measured.
        After an error ``check`` tells whether the same work may be tried again.
        """
        ...

    def check(self) -> None:
        """Raises ``EngineUnavailable`` if the device is lost, so that no later step can succeed."""
        ...


class Sampler(Protocol):
    """Chooses the next tokens."""

    def sample(self, logits: Any, sequences: list[Sequence], masks: list[Mask | None]) -> list[Sampled]:
        """One token for each row of ``logits``; ``sequences`` are the rows' owners, in order.

        ``masks`` tells for each row which tokens it may take, None for all.
        """
        ...


class Matcher(Protocol):
    """Follows one answer through its grammar. Never raises for what the grammar or the answer holds."""

    @property
    def accepting(self) -> bool:
        """Whether the answer may end here."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether no further token can follow: the grammar is at its end, or ``error`` tells what is in the way."""
        ...

    @property
    def error(self) -> str:
        """Which limit was met, or an empty string."""
        ...

    def mask(self) -> Mask:
        """Which tokens may come next, the end of the answer aside; worthless if ``stopped`` afterwards."""
        ...

    def allows(self, token_id: int) -> bool:
        """Whether ``mask`` would hold this token."""
        ...

    def consume(self, token_id: int) -> None:
        """Go on by a token."""
        ...

    def restart(self) -> None:
        """Go back to the grammar's beginning."""
        ...

    def copy(self) -> Matcher:
        """Another one at the same place, which goes its own way."""
        ...


class Grammars(Protocol):
    """Makes matchers. Called from threads of its own, because a large grammar takes long."""

    def build(self, grammar: str) -> Matcher:
        """A matcher at the beginning. Raises ``RequestRefused`` for a grammar that cannot be followed."""
        ...

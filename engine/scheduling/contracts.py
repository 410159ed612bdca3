"""The contracts between the core and its runner and sampler. No torch."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from engine.api.engine import ModelInfo
from engine.api.errors import OutOfMemory
from engine.api.events import TokenLogprobs
from engine.constraints.masks import Mask
from engine.scheduling.sequence import ScheduledChunk, Sequence


class Sampled(NamedTuple):
    """The next token of a sequence; ``logprobs`` only where the request asked for them.

    ``redrawn`` says that the device fed another token to a step that was launched ahead: that step means nothing.
    """

    token_id: int
    logprobs: TokenLogprobs | None
    redrawn: bool = False


class Runner(Protocol):
    """Computes a batch. Writes the keys and values of all its tokens into their blocks."""

    info: ModelInfo

    def forward(self, batch: list[ScheduledChunk]) -> Any:
        """Logits, one row for each chunk that samples, in the batch's order: float [rows, vocabulary].

        May return before the device is done. A sampler whose tokens stay there may be launched at once.
        After an error, ``check`` says whether the same chunk may be tried again.
        """
        ...

    def check(self) -> None:
        """Raises ``EngineUnavailable`` if the device is lost, so that no later step can succeed."""
        ...

    def shortage(self, error: BaseException) -> OutOfMemory | None:
        """What to say of a step that failed with ``error`` because memory ran out; None if it failed otherwise."""
        ...


class Sampler(Protocol):
    """Chooses the next tokens, in two phases, so that the next step can be launched before they are read."""

    def launch(
        self, logits: Any, sequences: list[Sequence], masks: list[Mask | None], pending: list[int | None]
    ) -> Any:
        """Begin to choose one token for each row of ``logits``; ``sequences`` are the rows' owners, in order.

        ``masks`` has for each row the tokens that it may take, None for all. ``pending`` has for each row the row of
        the launch before whose token is the newest of this sequence and not read yet, None if all are known.
        """
        ...

    def finish(self, launched: Any) -> list[Sampled]:
        """The tokens of what ``launch`` returned, once they and the step before them are computed."""
        ...

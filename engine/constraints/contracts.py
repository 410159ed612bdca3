"""The contract between the core and the grammars that answers follow. No torch."""

from __future__ import annotations

from typing import Protocol

from engine.constraints.masks import Mask


class Matcher(Protocol):
    """Follows one answer through its grammar. Never raises, whatever the grammar or the answer contains."""

    @property
    def accepting(self) -> bool:
        """Whether the answer may end here."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether no further token can follow: the grammar is at its end, or ``error`` says why not."""
        ...

    @property
    def error(self) -> str:
        """The limit that was exceeded, or an empty string."""
        ...

    def mask(self) -> Mask:
        """Which tokens may come next, apart from those that end the answer; meaningless if ``stopped`` afterwards."""
        ...

    def allows(self, token_id: int) -> bool:
        """Whether ``mask`` would contain this token."""
        ...

    def consume(self, token_id: int) -> None:
        """Advance by a token."""
        ...

    def restart(self) -> None:
        """Go back to the grammar's beginning."""
        ...

    def copy(self) -> Matcher:
        """An independent matcher at the same place."""
        ...


class Grammars(Protocol):
    """Compiles grammars. Called from threads of its own, because a large grammar takes long."""

    def build(self, grammar: str) -> Matcher:
        """A matcher at the beginning. Raises ``RequestRefused`` for a grammar that cannot be followed."""
        ...

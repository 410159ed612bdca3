"""What the core asks of grammars. No torch."""

from __future__ import annotations

from typing import Protocol

from engine.constraints.masks import Mask


class Matcher(Protocol):
    """Follows one answer through its grammar. Never raises for what the grammar or the answer holds."""

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
        """Which tokens may come next, the end of the answer aside; worthless if ``stopped`` afterwards."""
        ...

    def allows(self, token_id: int) -> bool:
        """Whether ``mask`` would hold this token."""
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
    """Makes matchers. Called from threads of its own, because a large grammar takes long."""

    def build(self, grammar: str) -> Matcher:
        """A matcher at the beginning. Raises ``RequestRefused`` for a grammar that cannot be followed."""
        ...

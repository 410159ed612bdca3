"""Replaces the grammar compiler where llguidance is not installed, so that the engine runs without it."""

from __future__ import annotations

from engine.api.errors import RequestRefused
from engine.constraints.contracts import Matcher


class MissingGrammars:
    """``engine.constraints.contracts.Grammars`` that refuses every grammar, and says what to install."""

    def build(self, grammar: str) -> Matcher:  # noqa: ARG002
        """Raises ``RequestRefused``."""
        raise RequestRefused(
            "grammar is given, but llguidance is not installed beside this engine; "
            "install it (pip install llguidance), or leave grammar out."
        )

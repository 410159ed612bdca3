"""What the operator is told when something must be changed before Castor can do what was asked."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches


class ConfigError(Exception):
    """A setting, a file or an option of the operator is wrong; the message is one sentence that says what to change."""


def did_you_mean(name: str, known: Collection[str], prefix: str = "") -> str:
    """`` (did you mean A?)`` for a name that is close to a known one, else nothing; a ``prefix`` of all does not
    count."""
    short = [other.removeprefix(prefix) for other in known]
    near = get_close_matches(name.removeprefix(prefix), short, n=1, cutoff=0.7)
    return f" (did you mean {prefix}{near[0]}?)" if near else ""

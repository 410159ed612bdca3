"""The error of the command line: the operator must change something before Castor can do what was asked."""

from __future__ import annotations


class ConfigError(Exception):
    """A setting, a file or an option of the operator is wrong; the message is one sentence that says what to change."""

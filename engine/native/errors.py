"""Why the native forward is not used."""

from __future__ import annotations


class NotNative(Exception):
    """This model, cache or machine is not for the native forward; the message says why, for the log."""

"""Why the native forward is not used."""

from __future__ import annotations


class NotNative(Exception):
    """This model, cache or machine is not for the native forward; the message says why, for the log."""


class DifferentNumbers(NotNative):
    """The native forward computed something else than the model; this was seen after the weights were packed."""

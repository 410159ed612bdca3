"""Why the native forward is not used."""

from __future__ import annotations


class NotNative(Exception):
    """This model, cache or machine is not for the native forward; the message says why, for the log."""


class WeightsGone(NotNative):
    """Something went wrong after the weights were packed, so that the model has to be loaded again for torch."""


class DifferentNumbers(WeightsGone):
    """The native forward computed something else than the model."""

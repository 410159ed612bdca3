"""Why the native forward is not used."""

from __future__ import annotations


class NotNative(Exception):
    """The native forward does not support this model, cache or machine; the message says why, for the log."""


class WeightsGone(NotNative):
    """Something went wrong after the weights were packed, so that the model has to be loaded again for torch."""


class DifferentNumbers(WeightsGone):
    """The results of the native forward differ from the model's own."""

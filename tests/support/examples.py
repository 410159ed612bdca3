"""The examples of property tests: the same in every run of the suite, or new ones and more of them to explore.

``derandomize`` alone does not make them the same. Hypothesis draws one number or text in twenty from constants that it
finds in those modules of the project that happen to be imported. Which ones depends on the tests before, on the worker
and on the folder of the checkout; and a constant that changes anywhere in the code changes the examples of all tests.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture.providers import HypothesisProvider
from hypothesis.internal.constants_ast import Constants

NORMAL, EXPLORING = 100, 1000


def register_profiles() -> None:
    """``castor`` for the suite and ``explore`` for ``scripts/test --explore``, which gives the seed. No clock over
    either, and no memory of earlier runs."""
    # Hypothesis has no setting for it. A backend of our own is documented, but not all draws of the engine go through
    # it. Where this attribute loses its meaning, tests/test_examples.py fails.
    HypothesisProvider._local_constants = Constants()
    always = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
    settings.register_profile("castor", always, derandomize=True, max_examples=NORMAL)
    # Said here because Hypothesis is derandomised by default where CI is set.
    settings.register_profile("explore", always, derandomize=False, max_examples=EXPLORING)


def examples(number: int) -> int:
    """``max_examples`` of a test that needs more or fewer than usual, in proportion to the profile's."""
    return number * settings.default.max_examples // NORMAL

"""Waiting for what another process or thread does: for a while, and then the test fails and says so."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 60.0
"""Generous: it is used up only where what is waited for never comes."""


def comes_true(condition: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    assert comes_true(condition, seconds), f"it did not come true within {seconds:g} s"

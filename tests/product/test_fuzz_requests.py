"""A thousand recorded requests, each spoilt in one place: none stops the real server or gets an answer of no kind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.product

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz"
SECONDS = 60
"""For one request: far more than it takes, because other tests run beside this one. The script's own limit is 30."""


@pytest.mark.timeout(900)
def test_a_thousand_requests() -> None:
    command = [sys.executable, str(SCRIPT), "--count", "1000", "--seed", "13", "--seconds", str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=840, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1000 of 1000 requests" in done.stdout

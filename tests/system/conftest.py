"""Tests that change the system around a server: each makes what it needs, and removes it."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def root_on_linux(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--system"):
        pytest.skip("needs root on Linux: runs with --system, as in .ci/run")
    if os.uname().sysname != "Linux" or os.geteuid() != 0:
        pytest.fail("--system needs root on Linux")

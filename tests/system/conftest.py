"""Tests that change the system around a server: each makes what it needs, and removes it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.device import control_groups


def can_make_control_groups() -> bool:
    """Many containers may not. What the engine reads of groups is tested with folders, too."""
    try:
        for folder in control_groups.folders("memory", Path("/")):
            trial = folder / f"castor-trial-{os.getpid()}"
            trial.mkdir()
            trial.rmdir()
    except OSError:
        return False
    return True


collect_ignore = [] if os.geteuid() == 0 and can_make_control_groups() else ["test_memory_limit.py"]


@pytest.fixture(autouse=True, scope="session")
def root_on_linux(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--system"):
        pytest.skip("needs root on Linux: runs with --system, as in .ci/run")
    if os.uname().sysname != "Linux" or os.geteuid() != 0:
        pytest.fail("--system needs root on Linux")

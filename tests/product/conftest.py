"""The real server with the real built-in model, one for all product tests of a test process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.server import RunningServer, running_server


@pytest.fixture(scope="session")
def castor(builtin_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Serves the repository's own models.yaml. Shared: a test must leave it as it found it."""
    with running_server(tmp_path_factory.mktemp("castor")) as server:
        yield server

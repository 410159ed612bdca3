"""The real server with the real built-in model, one for all product tests of a test process, and a restless one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.server import RunningServer, running_server
from support.tiny import endless_model_folder

MODELS = Path(__file__).parents[2] / "models.yaml"


@pytest.fixture(scope="session")
def castor(builtin_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Serves the repository's own models.yaml. Shared: a test must leave it as it found it."""
    with running_server(tmp_path_factory.mktemp("castor")) as server:
        yield server


@pytest.fixture(scope="session")
def restless(builtin_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Sends a keep-alive after 50 ms of silence; has a model that never ends beside those of models.yaml. Shared."""
    folder = tmp_path_factory.mktemp("restless")
    endless = endless_model_folder(folder / "endless", max_position_embeddings=32_768, num_hidden_layers=1)
    entries = yaml.safe_load(MODELS.read_text())["models"] | {"endless": {"source": str(endless)}}
    (folder / "models.yaml").write_text(yaml.safe_dump({"models": entries}))
    environment = {"CASTOR_KEEPALIVE_SECONDS": "0.05"}
    with running_server(folder, "--models", str(folder / "models.yaml"), environment=environment) as server:
        yield server

"""A thousand random and hostile schemas, patterns and functions: none stops the real server, whatever it asks for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.server import running_server
from support.tiny import light_model_folder

pytestmark = pytest.mark.product

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_schemas"
SECONDS = 60
"""For one input: far more than it takes, because other tests run beside this one. The script's own limit is 6."""


@pytest.mark.timeout(900)
def test_a_thousand_inputs(builtin_model: Path, tmp_path: Path) -> None:
    with running_server(tmp_path, str(light_model_folder(tmp_path / "light", builtin_model))) as server:
        command = [sys.executable, str(SCRIPT), "--url", server.url, "--pid", str(server.process.pid)]
        command += ["--count", "1000", "--seed", "10", "--seconds", str(SECONDS)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=840, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "1000 of 1000 inputs" in done.stdout
        assert server.process.poll() is None
        last = {"contents": "Hi", "generationConfig": {"maxOutputTokens": 1}}
        assert server.generate(last, model="light").status_code == 200

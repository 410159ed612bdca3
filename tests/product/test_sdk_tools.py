"""Function calling from the real model, driven by the official Python SDK's own loop, in three versions."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from support.server import RunningServer

ROOT = Path(__file__).parents[2]
CLIENT = Path(__file__).parent / "clients" / "genai_tools.py"
VERSIONS = ("3.4.0", "2.34.0", "1.60.0")

pytestmark = pytest.mark.product


@pytest.mark.parametrize("version", VERSIONS)
def test_the_sdks_loop_ends_with_the_result_in_the_context(version: str, castor: RunningServer) -> None:
    python = ROOT / ".test-envs" / f"google-genai-{version}" / "bin" / "python"
    if not python.exists():
        message = f"google-genai {version} is not installed: run scripts/sdk-envs"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    done = subprocess.run([python, CLIENT, castor.url], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["outcome"]) >= 8
    assert {name: text for name, text in report["outcome"].items() if text != "ok"} == {}

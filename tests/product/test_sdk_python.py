"""The official Python SDK, in three versions, each in an environment of its own, against the real server."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from support.server import RunningServer

ROOT = Path(__file__).parents[2]
CLIENT = Path(__file__).parent / "clients" / "genai_client.py"
VERSIONS = ("3.4.0", "2.34.0", "1.60.0")

pytestmark = pytest.mark.product


def sdk_python(version: str) -> Path:
    python = ROOT / ".test-envs" / f"google-genai-{version}" / "bin" / "python"
    if not python.exists():
        message = f"google-genai {version} is not installed: run scripts/sdk-envs"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return python


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("prefix", ["", "/genai"])
def test_the_sdk_does_its_whole_job(version: str, prefix: str, castor: RunningServer) -> None:
    done = subprocess.run(
        [sdk_python(version), CLIENT, castor.url + prefix], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["version"] == version
    assert len(report["outcome"]) >= 14
    assert {name: text for name, text in report["outcome"].items() if text != "ok"} == {}

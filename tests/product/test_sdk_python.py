"""The official Python SDK, in three versions, each in an environment of its own, against the real server."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from support.sdks import sdk_python
from support.server import RunningServer

CLIENT = Path(__file__).parent / "clients" / "genai_client.py"

pytestmark = pytest.mark.product


@pytest.mark.parametrize(("version", "prefix"), [("3.4.0", ""), ("2.34.0", "/genai"), ("1.60.0", "")])
def test_the_sdk_does_its_whole_job(version: str, prefix: str, castor: RunningServer) -> None:
    done = subprocess.run(
        [sdk_python(version), CLIENT, castor.url + prefix], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["version"] == version
    assert len(report["outcome"]) >= 14
    assert {name: text for name, text in report["outcome"].items() if text != "ok"} == {}

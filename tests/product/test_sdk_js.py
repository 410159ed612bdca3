"""The official JavaScript SDK, through Node, against the real server."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from support.sdks import JS_SDK, node_with_sdk
from support.server import RunningServer

CLIENT = Path(__file__).parent / "clients" / "genai_client.mjs"

pytestmark = pytest.mark.product


@pytest.mark.parametrize("prefix", ["", "/genai"])
def test_the_sdk_does_its_whole_job(prefix: str, castor: RunningServer) -> None:
    done = subprocess.run(
        [node_with_sdk(), CLIENT, JS_SDK, castor.url + prefix], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["version"] == "3.1.0"
    assert len(report["outcome"]) >= 10
    assert {name: text for name, text in report["outcome"].items() if text != "ok"} == {}

"""The official JavaScript SDK, through Node, against the real server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.server import RunningServer

ROOT = Path(__file__).parents[2]
CLIENT = Path(__file__).parent / "clients" / "genai_client.mjs"
SDK = ROOT / ".test-envs" / "google-genai-js-3.1.0"

pytestmark = pytest.mark.product


def require_node() -> str:
    node = shutil.which("node")
    if node and (SDK / "node_modules").exists():
        return node
    message = "Node is not installed" if node is None else "@google/genai is not installed: run scripts/sdk-envs"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.mark.parametrize("prefix", ["", "/genai"])
def test_the_sdk_does_its_whole_job(prefix: str, castor: RunningServer) -> None:
    done = subprocess.run(
        [require_node(), CLIENT, SDK, castor.url + prefix], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["version"] == "3.1.0"
    assert len(report["outcome"]) >= 10
    assert {name: text for name, text in report["outcome"].items() if text != "ok"} == {}

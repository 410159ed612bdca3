"""The clients that scripts/sdk-envs installs, and how their check scripts are run.

One that is missing fails in CI and is a skip with its reason elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ENVIRONMENTS = Path(__file__).parents[2] / ".test-envs"
CLIENTS = Path(__file__).parents[1] / "product" / "clients"
PYTHON_SDKS = ("3.6.1", "2.34.0", "1.60.0")
JS_SDK = ENVIRONMENTS / "google-genai-js-3.1.0"


def sdk_python(version: str) -> str:
    """The interpreter of the environment that has this version of google-genai."""
    return environment(f"google-genai-{version}", "bin/python")


def node() -> str:
    return _required(shutil.which("node"), "Node is not installed")


def java() -> str:
    """The JDK's launcher, which compiles a single file itself; a runtime without the compiler cannot."""
    _required(shutil.which("javac"), "no JDK is installed")
    return _required(shutil.which("java"), "no JDK is installed")


def environment(name: str, part: str) -> str:
    """The path of ``part`` in one of the environments."""
    return _required(ENVIRONMENTS / name / part, f"{name} is not installed: run scripts/sdk-envs")


def check_report(command: list[str | Path], checks: int, version: str | None = None) -> dict[str, Any]:
    """Run a client that prints the outcome of its checks as JSON, at least ``checks`` of them; all must be ok."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert len(report["outcome"]) >= checks
    assert version is None or report["version"] == version
    failed = [f"{name}: {text}" for name, text in report["outcome"].items() if text != "ok"]
    assert not failed, "\n".join(failed)
    return report


def _required(found: str | Path | None, reason: str) -> str:
    if found and Path(found).exists():
        return str(found)
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)

"""Where scripts/sdk-envs puts the client SDKs; a missing one fails in CI and is a skip with its reason elsewhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

ENVIRONMENTS = Path(__file__).parents[2] / ".test-envs"
JS_SDK = ENVIRONMENTS / "google-genai-js-3.1.0"


def sdk_python(version: str) -> Path:
    """The interpreter of the environment that has this version of google-genai."""
    python = ENVIRONMENTS / f"google-genai-{version}" / "bin" / "python"
    if not python.exists():
        _missing(f"google-genai {version} is not installed: run scripts/sdk-envs")
    return python


def node_with_sdk() -> str:
    """Node, where it and @google/genai are installed."""
    node = shutil.which("node")
    if node is None:
        _missing("Node is not installed")
    if not (JS_SDK / "node_modules").exists():
        _missing("@google/genai is not installed: run scripts/sdk-envs")
    return str(node)


def _missing(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)

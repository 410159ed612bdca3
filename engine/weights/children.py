"""Processes that do what needs torch, pip or much memory; they find this code wherever it lies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine.api.engine import EngineConfig
from engine.api.errors import SourceError
from engine.api.model_report import ModelReport, report_from

POLL_SECONDS = 0.2
CHECK_SECONDS = 600
_DECIDING = ("dtype", "device", "max_context", "kv_dtype", "kv_memory", "native", "quantize")
"""The fields of a configuration that a check of a model depends on."""


def follow(command: list[str], work: Path, tick: Callable[[str], None]) -> tuple[int, str]:
    """Run a child to its end, passing its output so far to ``tick``; kill it if this process is interrupted."""
    environment = _environment() | {"TMPDIR": str(work), "PYTHONUNBUFFERED": "1"}
    log = work / "log"
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, cwd=work)
    try:
        while child.poll() is None:
            tick(log.read_text("utf-8", "replace"))
            time.sleep(POLL_SECONDS)
    finally:
        child.kill()
        child.wait()
    output = log.read_text("utf-8", "replace")
    tick(output)
    return child.returncode, output


def check_model(path: Path, wanted: EngineConfig, held: int | None = None, details: Path | None = None) -> ModelReport:
    """What ``engine.check`` says of the folder or GGUF file at ``path``, to be started as ``wanted`` says.

    ``held`` are the bytes of weights that a folder lacks and that would be fetched. Into the folder ``details`` goes
    what a GGUF file says of its chat template and its sampling. Raises ``SourceError`` if the check itself fails.
    """
    settings = json.dumps({name: getattr(wanted, name) for name in _DECIDING})
    command = [sys.executable, "-m", "engine.check", str(path.resolve()), "--config", settings]
    command += [] if held is None else ["--held", str(held)]
    command += [] if details is None else ["--details", str(details.resolve())]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=_environment(), timeout=CHECK_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise SourceError(f"the check of {path} did not end within {CHECK_SECONDS} seconds") from None
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    if done.returncode != 0 or not lines:
        said = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"])[-1]
        raise SourceError(f"the check of {path} ended with status {done.returncode}: {said}")
    return report_from(json.loads(lines[-1]))


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}

"""Runs short programs in processes of their own: returns what they print, or raises one sentence that says why not."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from server.config.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, where the programs of benchmarks/ and the environments of the peers are."""


def output_of(name: str, command: Sequence[str], task: str, seconds: float) -> str:
    """The standard output of a program that imports from this Castor and gets ``task``. Raises ``ConfigError``."""
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            command,
            input=task,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            env={**os.environ, "PYTHONPATH": search},
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{name} did not end within {seconds:.0f} s") from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be run: {error.strerror}") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it printed no error"])[-1]
        raise ConfigError(f"{name} failed with status {done.returncode}: {reason}")
    return done.stdout

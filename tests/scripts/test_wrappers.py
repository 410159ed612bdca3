"""``scripts/serve`` and ``scripts/castor`` in an environment that is installed: wrong options are told at once."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 120


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CASTOR_")}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment, cwd=ROOT
    )


@pytest.fixture(autouse=True)
def installed() -> None:
    """The scripts would install first what is missing, and that takes minutes."""
    if run("bash", "-c", 'source scripts/environment.sh; installed ""').returncode:
        pytest.skip("this checkout is not installed: run scripts/test")


def test_castor_is_the_command() -> None:
    done = run("./scripts/castor", "--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "castor")


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--help"], 0, "Usage"),
        (["--prot", "1"], 2, "No such option"),
        (["--models", "nowhere.yaml"], 1, "castor: the models file nowhere.yaml cannot be read"),
    ],
)
def test_serve_checks_its_options_before_it_fetches(args: list[str], code: int, said: str) -> None:
    done = run("./scripts/serve", *args)
    assert done.returncode == code
    assert said in done.stdout + done.stderr

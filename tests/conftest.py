"""Models with real weights for the tests that need them; prepared once per machine, in the cache that users have."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from support.examples import register_profiles
from support.gemma import prepare_gemma

from engine.weights.sources import parse_source, prepare
from server.config.models_file import load_specs
from server.config.settings import Settings

ROOT = Path(__file__).parents[1]

if "PYTEST_XDIST_WORKER" in os.environ:
    # Read by torch when it is imported, here and in the engines that tests start: the workers share the cores.
    os.environ["OMP_NUM_THREADS"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background jobs ignore it, and so would every process that the tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run and on every machine: what fails, a change has broken. scripts/test --explore names the
# other profile, which pytest loads after this one.
register_profiles()
settings.load_profile("castor")


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Bytes that are no text are named by their length: workers must agree on names, and packed bytes hold the time."""
    return f"{argname}-{len(val)}-bytes" if isinstance(val, bytes) and not val.isascii() else None


@pytest.fixture(autouse=True)
def as_in_a_new_process() -> None:
    """What a test draws without a seed of its own, and how many threads compute it, does not depend on the tests before
    it: two workers with two threads each on two cores take ten times as long as with one."""
    random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    return Settings.from_env(os.environ).cache_dir


@pytest.fixture(scope="session")
def builtin_model(cache_dir: Path) -> Path:
    """The prepared folder of the model in the repository's models.yaml."""
    spec = load_specs(ROOT / "models.yaml")[0]
    return prepare(parse_source(spec.source), spec.sha256, cache_dir, _silent)


@pytest.fixture(scope="session")
def gemma_model(cache_dir: Path) -> Path:
    """The prepared folder of Gemma 3 270M."""
    return prepare_gemma(cache_dir, _silent)


def _silent(stage: str, fraction: float) -> None:
    """Nobody watches."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--system", action="store_true", help="run the tests that need root on Linux")
    parser.addoption("--left-out", metavar="FILE", help="add the tests that are skipped, and why, to this file")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if path := config.getoption("--left-out"):
        with open(path, "a") as file:
            for report in terminalreporter.stats.get("skipped", []):
                file.write(f"{report.nodeid}: {report.longrepr[2].removeprefix('Skipped: ')}\n")

"""Runs the harness as ``python -m benchmarks.harness``."""

from benchmarks.harness.cli import app
from server.cli import run

run(app)

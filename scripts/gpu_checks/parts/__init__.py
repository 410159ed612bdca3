"""The parts of a check, by name. Each runs alone, within its time, and reports each finding at once."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from gpu_checks.check import Check

# Minutes of each part. A first run takes the parts of FIRST, and the rest of its seven minutes for imports.
MINUTES = {
    "correctness": 4.1, "kernels": 0.4, "packed": 0.4, "decode": 0.5, "core": 0.7, "peers": 0.6, "server": 2.8
}  # fmt: skip
FIRST = ("correctness", "kernels", "packed", "decode", "core", "peers")


def run_of(name: str) -> Callable[[Check], None]:
    """The function of a part. Imported when its turn comes: a package that one part lacks must not affect the
    others."""
    run: Callable[[Check], None] = import_module(f"gpu_checks.parts.{name}").run
    return run

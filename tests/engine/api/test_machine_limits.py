"""What the front end asks of the machine, without torch."""

from __future__ import annotations

import subprocess
import sys

from engine.api.machine import cores, total_bytes


def test_it_is_what_the_engine_counts_and_costs_no_torch() -> None:
    code = "import sys; from engine.api.machine import *; print(cores(), total_bytes(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(cores()), str(total_bytes()), "False"]

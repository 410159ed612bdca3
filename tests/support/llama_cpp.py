"""llama.cpp, from its package xllamacpp, in a process of its own; scripts/sdk-envs installs it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from support.sdks import environment


def python() -> str:
    """The interpreter of its environment; a test that asks for it is skipped where there is none."""
    return environment("xllamacpp-2026.10.11549", "bin/python")


def ask(path: Path, tokens: int, prompts: Any) -> Any:
    """What it answers for a file, as ``ask_llama_cpp.py`` tells."""
    done = subprocess.run(
        [python(), Path(__file__).with_name("ask_llama_cpp.py"), path, str(tokens)],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)

"""An engine in a control group that may take less memory than the machine has: long prompts do not get it killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny import tiny_model_folder

from engine.device import control_groups
from engine.device.machine_memory import total_bytes

pytestmark = pytest.mark.system

LIMIT = 1 << 30
PROMPTS = 12
"""Of 500 tokens each, which leave 125 MiB in the cache: more than the group may take."""

ANSWERED = """
import json, os, sys
from pathlib import Path

folder, group, path, prompts = json.loads(sys.argv[1])
Path(group, "cgroup.procs").write_text(str(os.getpid()))
sys.path[:0] = path

from engine.build import build_core
from engine.device.machine_memory import total_bytes
from engine.api.engine import EngineConfig
from engine.api.requests import Request
from engine.api.sampling import SamplingParams

core = build_core(EngineConfig(folder, device="cpu", threads=1), lambda *_: None)
length = min(500, core.info.max_context - 2)
for number in range(prompts):
    core.submit(Request(str(number), tuple((7 * n + number) % 250 for n in range(length)), SamplingParams(2)))
errors = []
while core.has_work:
    errors += [events.done.error for events in core.step() if events.done and events.done.error]
print(json.dumps({"total": total_bytes(), "errors": len(errors), "context": core.info.max_context}))
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A group within the one of this process, whose limit is ``LIMIT``."""
    own = next(folder for folder in control_groups.folders("memory", Path("/")) if (folder / "memory.stat").is_file())
    made = own / f"castor-test-{os.getpid()}"
    made.mkdir()
    names = ("memory.max", "memory.limit_in_bytes")
    next(made / name for name in names if (made / name).is_file()).write_text(str(LIMIT))
    yield made
    made.rmdir()


def test_long_prompts_within_a_limit(group: Path, tmp_path: Path) -> None:
    assert total_bytes() > 2 * LIMIT, "the limit is to be less than what the machine has"
    wide = {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 256, "max_position_embeddings": 1024}
    folder = tiny_model_folder(tmp_path / "model", **wide)
    told = json.dumps([str(folder), str(group), sys.path, PROMPTS])
    done = subprocess.run(
        [sys.executable, "-c", ANSWERED, told], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    answered = json.loads(done.stdout.splitlines()[-1])
    assert answered["total"] == LIMIT
    assert answered["errors"] == 0
    assert answered["context"] >= 128

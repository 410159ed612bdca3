"""The shape of the engine: what its modules may import."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from support.tiny import tiny_model_folder

import engine

ROOT = Path(engine.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
BORDER = ROOT / "process"
LIGHT = (
    BORDER,
    *(ROOT / name for name in ("api", "core", "scheduling", "text")),
    *(ROOT / "cache" / name for name in ("block_pool.py", "layout.py", "lazy_memory.py", "plan_summary.py")),
    *(ROOT / "constraints" / name for name in ("contracts.py", "masks.py")),
    *(ROOT / "device" / name for name in ("control_groups.py", "cpu_count.py", "machine_memory.py", "shortage.py")),
    *(ROOT / "image" / name for name in ("image_file.py", "sample.py", "start.py", "links.py")),
    *(ROOT / "native" / name for name in ("library.py", "runner.py")),
    ROOT / "platforms" / "machine.py",
    *(ROOT / "sampling").glob("*.py"),
)
FRONT = {"server", "pydantic", "starlette", "uvicorn", "fastapi", "httpx", "requests", "aiohttp", "urllib3", "http"}


def imported(path: Path) -> set[str]:
    """The top-level names of everything that a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add(str(node.module).partition(".")[0])
    return names


def test_modules_are_found() -> None:
    assert len(MODULES) > 50
    assert all(place.exists() for place in LIGHT)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_of(path: Path) -> None:
    names = imported(path)
    assert not names & FRONT
    if not path.is_relative_to(BORDER):
        assert not names & {"msgspec", "zmq"}
    if any(path.is_relative_to(place) for place in LIGHT):
        assert not names & {"torch", "transformers"}


def test_the_client_needs_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules)"
    code = f"import sys, engine.process.client; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT.parent)


# Runs a request and one with a grammar, where no package but those of the first argument can be found.
BARE = """
import json, sys

packages, folder = json.loads(sys.argv[1]), sys.argv[2]
known = {*sys.stdlib_module_names, *packages, "engine"}


class Only:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        # The one module of the standard library whose name depends on the machine.
        allowed = name.partition(".")[0] in known or name.startswith("_sysconfigdata")
        return self.finder.find_spec(name, path, target) if allowed else None


sys.meta_path[:] = [Only(finder) for finder in sys.meta_path]

from engine.api.engine import EngineConfig
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.build import build_core

core = build_core(EngineConfig(folder, device="cpu", threads=1), lambda stage, fraction: None)
core.submit(Request("plain", (5, 6, 7), SamplingParams(max_tokens=4)))
core.submit(Request("grammar", (5, 6, 7), SamplingParams(max_tokens=4, grammar='start: "a"')))
done = {}
while core.has_work:
    done |= {events.request_id: events.done for events in core.step() if events.done}
core.check()
core.close()
plain, grammar = done["plain"], done["grammar"].error
loaded = sorted({"llguidance", "msgspec", "zmq", "gguf", "accelerate"} & sys.modules.keys())
print(json.dumps([plain.candidate_tokens, plain.error, grammar.kind, grammar.message, loaded]))
"""


def required(*names: str) -> set[str]:
    """The packages and all that they require, without their extras."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name not in found:
            found.add(name)
            try:
                lines = requires(name) or []
            except PackageNotFoundError:
                continue  # for another system
            waiting += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines if "extra ==" not in line]
    return found


def test_the_loop_runs_with_nothing_but_torch_and_transformers(tmp_path: Path) -> None:
    allowed = required("torch", "transformers")
    assert not allowed & {"llguidance", "msgspec", "pyzmq", "gguf", "accelerate"}
    modules = [
        module
        for module, owners in packages_distributions().items()
        if any(re.sub(r"[-_.]+", "-", owner).lower() in allowed for owner in owners)
    ]
    tiny_model_folder(tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", BARE, json.dumps(modules), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT.parent)},
        capture_output=True,
        timeout=240,
        cwd=tmp_path,
        check=False,
    )
    assert child.returncode == 0, child.stderr.decode()
    tokens, error, kind, message, loaded = json.loads(child.stdout)
    assert (tokens, error) == (4, None)
    assert kind == "refused"
    assert "pip install llguidance" in message
    assert loaded == []

"""The shape of the engine: what its modules may import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import engine

ROOT = Path(engine.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
BORDER = {"messages.py", "worker.py", "client.py", "supervisor.py"}
PURE = {"types.py", "batch.py", "blocks.py", "scheduler.py", "pacing.py", "core.py", "text"}
FRONT = {"server", "pydantic", "starlette", "uvicorn", "fastapi", "httpx", "requests", "aiohttp", "urllib3", "http"}
LIGHT = BORDER | PURE


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


def part(path: Path) -> str:
    """A module of the engine by its file name, or the sub-package that it lies in."""
    return path.relative_to(ROOT).parts[0]


def test_modules_are_found() -> None:
    assert {part(path) for path in MODULES} >= BORDER


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_of(path: Path) -> None:
    names = imported(path)
    assert not names & FRONT
    if part(path) not in BORDER:
        assert not names & {"msgspec", "zmq"}
    if part(path) in LIGHT:
        assert not names & {"torch", "transformers"}


def test_the_client_needs_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules)"
    code = f"import sys, engine.client; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT.parent)

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
BORDER = ROOT / "process"
LIGHT = (
    BORDER,
    *(ROOT / name for name in ("api", "core", "scheduling", "text")),
    *(ROOT / "cache" / name for name in ("block_pool.py",)),
    *(ROOT / "constraints" / name for name in ("contracts.py", "masks.py")),
    *(ROOT / "device" / name for name in ("control_groups.py", "cpu_count.py", "machine_memory.py")),
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

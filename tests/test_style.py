"""The house rules that a linter has no setting for: short files, short functions, modules that say what they do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path for package in ("server", "engine", "benchmarks", "scripts") for path in (ROOT / package).rglob("*.py")
)
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_stays_within_the_house_rules(path: Path) -> None:
    text = path.read_text("utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert ast.get_docstring(tree) is not None, "the first line says what happens in this module"
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_what_tests_send_is_the_same_in_every_run() -> None:
    """Bytes that nobody can have again make a failure that nobody can see again."""
    random = "os." + "urandom"
    assert [path for path in (ROOT / "tests").rglob("*.py") if random in path.read_text("utf-8")] == []

"""The measures of the structure, on small trees where they can be counted by hand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from code_structure import Code, cycles, folders, helpers, imports, naming, read_code

ROOT = Path(__file__).parents[2]
Tree = Callable[[dict[str, str]], Code]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Writes files and reads them as a checkout."""

    def write(files: dict[str, str]) -> Code:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        return read_code(tmp_path)

    return write


def found(code: Code) -> dict[str, str]:
    """The caller of each helper; one that is handed over is marked."""
    return {h.function.name: f"{h.caller}{' value' if h.is_value else ''}" for h in helpers(code)}


def test_a_module_holds_more_than_a_docstring(tree: Tree) -> None:
    files = {
        "engine/__init__.py": '"""Empty."""\n',
        "engine/a.py": '"""A."""\nX = 1\n',
        "engine/b/__init__.py": "X = 1\n",
    }
    assert folders(tree(files)) == {Path("engine"): (1, 2), Path("engine/b"): (1, 1)}


def test_packages_of_scripts_are_measured_and_tests_are_not(tree: Tree) -> None:
    files = {"scripts/checks/__init__.py": "", "scripts/checks/a.py": "", "scripts/alone.py": "", "tests/test_a.py": ""}
    assert set(tree(files).modules) == {"checks", "checks.a"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def _f(): ...\ndef g(): _f()\n", {"_f": "g"}),
        ("def _f(): ...\nX = _f()\n", {"_f": "<module>"}),
        ("def _f(): ...\ndef g(): _f(); _f()\n", {}),
        ("def _f(): _f()\n", {}),
        ("def _f(): _f()\ndef g(): _f()\n", {"_f": "g"}),
        ("def f(): ...\ndef g(): f()\n", {}),
        ("def _f(): ...\ndef g(): return sorted([], key=_f)\n", {"_f": "g value"}),
        ("@mark\ndef _f(): ...\ndef g(): _f()\n", {}),
        ("def g():\n    def _f(): ...\n    _f()\n", {}),
        ("class A:\n    def _f(self): ...\n    def g(self): self._f()\n", {"A._f": "A.g"}),
        ("class A:\n    def __init__(self): ...\nA.__init__(1)\n", {}),
        ("class A:\n    def _f(self): ...\ndef g(a): a._f()\n", {"A._f": "g"}),
        ("class A:\n    def _f(self): ...\n    X = _f(1)\n", {"A._f": "<module>"}),
        # two classes with the same name of a method
        (
            "class A:\n    def _f(self): ...\n    def g(self): self._f()\n"
            "class B:\n    def _f(self): ...\n    def g(self): self._f(); self._f()\n",
            {"A._f": "A.g"},
        ),
        # a method that a derived class replaces, and one that only the derived class calls
        ("class A:\n    def _f(self): ...\n    def g(self): self._f()\nclass B(A):\n    def _f(self): ...\n", {}),
        ("class A:\n    def _f(self): ...\nclass B(A):\n    def g(self): self._f()\n", {"A._f": "B.g"}),
        ("async def _f(): ...\nasync def g(): await _f()\n", {"_f": "g"}),
        ("async def _f(): ...\nasync def g(): await wait_for(_f(), 1)\n", {"_f": "g value"}),
        ("async def _f(): yield 1\nasync def g():\n    async for x in _f(): ...\n", {"_f": "g"}),
    ],
)
def test_a_helper_is_private_and_called_from_one_place(source: str, expected: dict[str, str], tree: Tree) -> None:
    assert found(tree({"engine/a.py": source})) == expected


def test_another_module_counts_as_a_caller_where_it_imports(tree: Tree) -> None:
    files = {
        "engine/a.py": "def _f(): ...\ndef _g(): ...\ndef h(): _f(); _g()\n",
        "engine/b.py": "from engine.a import _f\nfrom engine import a\ndef h(): _f()\n",
        "engine/c.py": "def _g(): ...\ndef h(): _g()\n",
    }
    assert [(h.function.module.name, h.function.name) for h in helpers(tree(files))] == [
        ("engine.a", "_g"),
        ("engine.c", "_g"),
    ]
    files["engine/b.py"] += "a._g()\n"
    assert [(h.function.module.name, h.function.name) for h in helpers(tree(files))] == [("engine.c", "_g")]


def test_cycles_at_loading_are_fewer_than_those_with_late_imports(tree: Tree) -> None:
    files = {
        "engine/a.py": "from engine import b\n",
        "engine/b.py": "def f():\n    from engine.c import X\n",
        "engine/c.py": "from .a import b\nX = 1\n",
        "engine/d.py": "import engine.e\n",
        "engine/e.py": "from engine.d import X\n",
    }
    edges = list(imports(tree(files)))
    assert cycles((one, other) for one, other, loads in edges if loads) == [["engine.d", "engine.e"]]
    late = [["engine.a", "engine.b", "engine.c"], ["engine.d", "engine.e"]]
    assert cycles((one, other) for one, other, _ in edges) == late


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("x = a.top_k\n", True),
        ("f(top_k=1)\n", True),
        ("DEFAULT_TOP_K = 1\n", True),
        ('x = {"topK": 1}\n', True),
        ('raise ValueError(f"top_k is {x}")\n', True),
        ('"""Of top_k."""\n', False),
        ("x.topk(2)\n", False),
        ("x = stop_kinds\n", False),
    ],
)
def test_a_file_names_a_parameter_in_code_and_in_strings(source: str, named: bool, tree: Tree) -> None:
    assert naming(tree({"engine/a.py": source}), "top_k") == ([Path("engine/a.py")] if named else [])


def test_the_script_measures_this_checkout_and_the_way_of_a_request() -> None:
    command = [sys.executable, ROOT / "scripts" / "structure", "--helpers", "--journey"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    _, _, visits = done.stdout.partition(" of them to a module visited before.\n")
    assert len(set(visits.split())) > 3
    assert all(name.startswith(("server.", "engine.")) for name in visits.split())


def test_what_is_no_checkout_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "structure", "--root", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "name the root of a checkout" in done.stderr

"""The rules of the structure: what ``scripts/structure`` measures and may not get worse."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from code_structure import Code, cycles, imports, read_code  # noqa: E402


@pytest.fixture(scope="module")
def code() -> Code:
    return read_code(ROOT)


def test_there_is_something_to_measure(code: Code) -> None:
    assert len(code.modules) > 100
    assert len(code.functions) > 1000


def test_no_modules_import_each_other_not_even_late(code: Code) -> None:
    assert cycles((one, other) for one, other, _ in imports(code)) == []

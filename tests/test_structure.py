"""The rules of the structure: what ``scripts/structure`` measures and may not get worse."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from code_structure import Code, cycles, folders, helpers, imports, read_code  # noqa: E402

MAX_MODULES = 12
MAX_HELPERS = 0.12
"""Of all functions."""
OF_THE_ENGINE = ("engine.api", "engine.process.client", "engine.weights.sources")
"""What the server may import of the engine; of the first also what stands below it."""


@pytest.fixture(scope="module")
def code() -> Code:
    return read_code(ROOT)


def test_there_is_something_to_measure(code: Code) -> None:
    assert len(code.modules) > 100
    assert len(code.functions) > 1000


def test_no_modules_import_each_other_not_even_late(code: Code) -> None:
    assert cycles((one, other) for one, other, _ in imports(code)) == []


def test_a_folder_stays_small(code: Code) -> None:
    assert {str(folder): full for folder, (full, _) in folders(code).items() if full > MAX_MODULES} == {}


def test_few_functions_are_helpers_that_exist_for_their_size(code: Code) -> None:
    single = [helper for helper in helpers(code) if not helper.is_value]
    assert len(single) <= MAX_HELPERS * len(code.functions), "scripts/structure --helpers lists them"


def test_the_server_imports_only_the_surface_of_the_engine(code: Code) -> None:
    crossing = {
        (one, other)
        for one, other, _ in imports(code)
        if one.partition(".")[0] == "server" and other.partition(".")[0] == "engine"
    }
    assert crossing
    assert {
        edge for edge in crossing if edge[1] not in OF_THE_ENGINE and not edge[1].startswith("engine.api.")
    } == set()

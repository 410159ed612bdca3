"""Published configurations of the models that people run: a small copy of each is computed like a plain forward, and
docs/memory.md says what the whole model takes."""

from __future__ import annotations

import json

import pytest
from support.fates import NATIVE, TORCH
from support.memory_table import CONFIGS, FAMILIES, find_memory, row, rows_of_the_page, small_copy

from engine.native import library

pytestmark = pytest.mark.reference

NAMES = [name for names in FAMILIES.values() for name in names]
# One of each kind of layer, of those that are rehearsed in little time; scripts/memory-table rehearses all.
REHEARSED = ("Qwen3-8B", "gemma-4-E2B-it", "LFM2.5-1.2B-Instruct")


@pytest.fixture(autouse=True)
def code(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled once for all tests of this process."""
    cache = tmp_path_factory.getbasetemp() / "native"
    monkeypatch.setattr("engine.native.build.load_library", lambda _: library.load_library(cache))


@pytest.mark.parametrize("name", NAMES)
def test_a_small_copy_is_computed_like_a_plain_forward(name: str) -> None:
    """As the page says: by C code or by torch; a fate says "wrong" where logits are apart."""
    fate = small_copy(name)
    assert fate.what in (NATIVE, TORCH), fate.why
    assert rows_of_the_page()[name].endswith(f" | {fate.what} |")


@pytest.mark.parametrize("name", REHEARSED)
def test_the_page_says_what_a_dry_run_finds(name: str) -> None:
    family = next(family for family, names in FAMILIES.items() if name in names)
    line = rows_of_the_page()[name]
    assert line == row(family, find_memory(name), line.split(" | ")[-1].removesuffix(" |"))


def test_the_page_has_every_model_and_no_other() -> None:
    rows = rows_of_the_page()
    assert list(rows) == NAMES
    for name, line in rows.items():
        assert line.split(" | ")[2] in json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))["architectures"]

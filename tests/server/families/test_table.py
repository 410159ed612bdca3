"""What is known of a family stands in server/families, and nowhere else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.families.table import FAMILIES, completed, family_of
from server.families.tagged_calls import CASTOR

ROOT = Path(__file__).parents[3]
FAMILIES_FOLDER = ROOT / "server" / "families"
NAMES = re.compile(rf"\b({'|'.join(re.escape(family.name) for family in FAMILIES)})\b", re.IGNORECASE)
MARKERS = {marker for family in (*FAMILIES, CASTOR) for marker in (*family.markers, *family.end_tokens)}
"""Of all families. The name of Castor's own is left out below: it is the name of the program."""


def literals(path: Path) -> Iterator[str]:
    """The texts in a module that are no docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def mentions(text: str) -> bool:
    return bool(NAMES.search(text)) or any(marker in text for marker in MARKERS)


def test_mentions_are_found_where_they_are() -> None:
    for family in FAMILIES:
        assert any(family.name in literals(path) for path in FAMILIES_FOLDER.glob("*.py"))
    assert mentions("uses <think> here")
    assert mentions("is it Hermes?")
    assert not mentions("philosophy")


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "server").rglob("*.py")) if path.parent != FAMILIES_FOLDER],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_other_module_knows_a_family(path: Path) -> None:
    assert [text for text in literals(path) if mentions(text)] == []


def test_no_family_is_hidden_by_one_before_it() -> None:
    for family in FAMILIES:
        assert family_of(" ".join(family.recognised_by)).name == family.name
    assert family_of("{{ messages }}").name == CASTOR.name


def test_a_model_thinks_where_its_template_knows_the_markers() -> None:
    assert family_of("<tool_call>").thought is None
    assert family_of("<tool_call> <think>").thought == ("<think>", "</think>")


def test_only_castors_own_family_is_a_fallback() -> None:
    assert all(family.is_known for family in FAMILIES)
    assert not family_of("{{ messages }}").is_known
    assert family_of("[ARGS]", renders_tools=False).is_known


def test_a_template_that_shows_no_calls_is_completed_if_its_family_is_known() -> None:
    for family in FAMILIES:
        if family.opening:
            partial = " ".join(family.incomplete)
            whole = completed(partial)
            assert whole == family.opening + partial
            assert family_of(whole).name == family.name
            assert completed(whole) == whole
    assert completed("<|im_start|>{{ messages }}") == "<|im_start|>{{ messages }}"


def test_where_templates_show_no_functions_calls_are_castors() -> None:
    family = family_of("[ARGS]", renders_tools=False)
    assert (family.name, family.call, family.renders_tools) == ("mistral", CASTOR.call, False)
    assert set(CASTOR.markers) < set(family.markers)

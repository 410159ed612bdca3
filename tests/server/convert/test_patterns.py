"""Patterns that expand: what repetitions add, and how many patterns meet at one place."""

from __future__ import annotations

from typing import Any

import pytest

from server.convert.patterns import MAX_PATTERNS_AT_ONCE, expansion, pattern_problem

SIZES = [
    ("", 0),
    ("abc", 0),
    ("a{300}", 300 - 6),
    ("a{2,300}", 300 - 8),
    ("a{300,}", 300 - 7),
    ("[a-z{9}]{300}", 300 - 13),
    ("\\{300}", 0),
    ("\\p{L}{300}", 300 - 10),
    ("(a{100}){100}", 101 * 100 - 13),
    ("(?:a|b){50}c{50}", 4 * 50 + 50 - 16),
    ("(?<n>ab{30}){2}", 64 - 15),
    ("(((", 0),
    (")))", 0),
    ("a{99999999999}", 999999999 - 14),
]


@pytest.mark.parametrize(("pattern", "size"), SIZES)
def test_repetitions_written_out(pattern: str, size: int) -> None:
    assert expansion(pattern) == max(0, size)


@pytest.mark.parametrize(
    ("document", "place"),
    [
        ({"items": {"pattern": "a{9999}"}}, ".items.pattern"),
        ({"$defs": {"x": {"pattern": "a{9999}"}}, "$ref": "#/$defs/x"}, ".$defs.x.pattern"),
        ({"patternProperties": {"a{9999}": {}}, "pattern": "b"}, ".patternProperties"),
    ],
)
def test_the_place_of_a_costly_pattern(document: dict[str, Any], place: str) -> None:
    problem = pattern_problem(document)
    assert problem is not None
    assert problem[0] == place


def met(count: int) -> dict[str, Any]:
    return {"allOf": [{"properties": {"a": {"pattern": f"a{index}"}}} for index in range(count)]}


def test_patterns_that_meet() -> None:
    assert pattern_problem(met(MAX_PATTERNS_AT_ONCE)) is None
    assert pattern_problem(met(MAX_PATTERNS_AT_ONCE + 1)) is not None
    assert pattern_problem({"anyOf": [met(1) for _ in range(50)]}) is None


def test_patterns_that_meet_behind_references() -> None:
    pairs = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"pattern": f"a{i}"}]} for i in range(9)}
    deep = {"$defs": {**pairs, "d9": {"pattern": "x"}}, "$ref": "#/$defs/d0"}
    assert pattern_problem(deep) is not None
    growing = {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"pattern": "x"}]}}, "$ref": "#/$defs/a"}
    assert pattern_problem(growing) is not None
    harmless = {"$defs": {"a": {"allOf": [{"items": {"$ref": "#/$defs/a"}}, {"pattern": "x"}]}}, "$ref": "#/$defs/a"}
    assert pattern_problem(harmless) is not None  # seen as the one above: it is rare, and refusing it harms nobody

"""Patterns that expand: what repetitions add, and how many patterns meet at one place."""

from __future__ import annotations

from typing import Any

import pytest

from server.grammar.regex_cost import MAX_DIVISOR, MAX_PATTERNS_AT_ONCE, costly, expansion, forget_costly

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


ENDLESS = ["[", "[^", "[]", "(?‹", "(?<a", "(?P<", "(?i", "\\p{", "\\", "{1", "{1,", "((", "(]", "[\\]"]


@pytest.mark.parametrize("piece", ENDLESS)
def test_whatever_has_no_end_is_read_once(piece: str) -> None:
    """Each look for an end that is not there reads on to the end: a scanner that looks again reads a megabyte for
    hours."""
    assert expansion(piece * (1_000_000 // len(piece))) == 0


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
    problem = costly(document)
    assert problem is not None
    assert problem[0] == place


def met(count: int) -> dict[str, Any]:
    return {"allOf": [{"properties": {"a": {"pattern": f"a{index}"}}} for index in range(count)]}


def test_patterns_that_meet() -> None:
    assert costly(met(MAX_PATTERNS_AT_ONCE)) is None
    assert costly(met(MAX_PATTERNS_AT_ONCE + 1)) is not None
    assert costly({"anyOf": [met(1) for _ in range(50)]}) is None


def test_patterns_that_meet_behind_references() -> None:
    pairs = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"pattern": f"a{i}"}]} for i in range(9)}
    deep = {"$defs": {**pairs, "d9": {"pattern": "x"}}, "$ref": "#/$defs/d0"}
    assert costly(deep) is not None
    growing = {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"pattern": "x"}]}}, "$ref": "#/$defs/a"}
    assert costly(growing) is not None
    harmless = {"$defs": {"a": {"allOf": [{"items": {"$ref": "#/$defs/a"}}, {"pattern": "x"}]}}, "$ref": "#/$defs/a"}
    assert costly(harmless) is not None  # seen as the one above: it is rare, and refusing it harms nobody


DIVISORS = [(MAX_DIVISOR, 36, True), (MAX_DIVISOR, 0.01, True), (99_991, 2, False), (MAX_DIVISOR + 1, 1, False)]


@pytest.mark.parametrize(("one", "other", "fits"), DIVISORS)
def test_divisors_that_meet(one: float, other: float, fits: bool) -> None:
    assert (costly({"allOf": [{"multipleOf": one}, {"multipleOf": other}]}) is None) is fits
    assert (costly({"multipleOf": one, "anyOf": [{"multipleOf": other}, {}]}) is None) is fits
    assert costly({"anyOf": [{"multipleOf": 99_991}, {"multipleOf": 2}]}) is None


def test_only_what_is_costly_is_forgotten() -> None:
    schema = {"properties": {"a": {"pattern": "a{9999}", "maxLength": 3}, "b": {"multipleOf": 10_000_019}}}
    forget_costly(schema)
    assert schema == {"properties": {"a": {"maxLength": 3}, "b": {}}}

"""Patterns that expand: what repetitions add, and how many patterns meet at one place."""

from __future__ import annotations

from typing import Any

import pytest

from server.grammar.regex_cost import MAX_DIVISOR, MAX_PATTERNS_AT_ONCE, costly, expansion

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
    ("document", "found"),
    [
        ({"items": {"pattern": "a{9999}"}}, [({"pattern": "a{9999}"}, "pattern")]),
        ({"$defs": {"x": {"pattern": "a{9999}"}}, "$ref": "#/$defs/x"}, [({"pattern": "a{9999}"}, "pattern")]),
        ({"patternProperties": {"a{9999}": {}}}, [({"patternProperties": {"a{9999}": {}}}, "patternProperties")]),
        (
            {"properties": {"a": {"multipleOf": 10_000_019}, "b": {"multipleOf": 10}}},
            [({"multipleOf": 10_000_019}, "multipleOf")],
        ),
        ({"pattern": "a" * 5000}, [({"pattern": "a" * 5000}, "pattern")]),
    ],
)
def test_what_is_costly_alone(document: dict[str, Any], found: list[Any]) -> None:
    assert costly(document) == found


def met(count: int) -> dict[str, Any]:
    return {"allOf": [{"properties": {"a": {"pattern": f"a{index}"}}} for index in range(count)]}


def test_patterns_that_meet() -> None:
    assert costly(met(MAX_PATTERNS_AT_ONCE)) == []
    assert costly(met(MAX_PATTERNS_AT_ONCE + 1)) != []
    assert costly({"anyOf": [met(1) for _ in range(50)]}) == []


def test_patterns_that_meet_behind_references() -> None:
    pairs = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"pattern": f"a{i}"}]} for i in range(9)}
    deep = {"$defs": {**pairs, "d9": {"pattern": "x"}}, "$ref": "#/$defs/d0"}
    assert costly(deep) != []
    growing = {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"pattern": "x"}]}}, "$ref": "#/$defs/a"}
    assert costly(growing) != []
    harmless = {"$defs": {"a": {"allOf": [{"items": {"$ref": "#/$defs/a"}}, {"pattern": "x"}]}}, "$ref": "#/$defs/a"}
    assert costly(harmless) != []  # seen as the one above: it is rare, and refusing it harms nobody


DIVISORS = [(MAX_DIVISOR, 36, True), (MAX_DIVISOR, 0.01, True), (99_991, 2, False), (MAX_DIVISOR + 1, 1, False)]


@pytest.mark.parametrize(("one", "other", "fits"), DIVISORS)
def test_divisors_that_meet(one: float, other: float, fits: bool) -> None:
    assert (costly({"allOf": [{"multipleOf": one}, {"multipleOf": other}]}) == []) is fits
    assert (costly({"multipleOf": one, "anyOf": [{"multipleOf": other}, {}]}) == []) is fits
    assert costly({"anyOf": [{"multipleOf": 99_991}, {"multipleOf": 2}]}) == []


def test_where_several_are_costly_together_all_are_named() -> None:
    assert costly(met(MAX_PATTERNS_AT_ONCE + 1)) == [
        ({"pattern": f"a{index}"}, "pattern") for index in reversed(range(MAX_PATTERNS_AT_ONCE + 1))
    ]
    assert [keyword for _, keyword in costly({"allOf": [{"multipleOf": 99_991}, {"multipleOf": 2}]})] == [
        "multipleOf"
    ] * 2

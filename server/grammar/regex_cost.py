"""Finds what is known to cost llguidance too much in a schema: patterns, divisors, and how many apply to one value.

A divisor becomes a regular expression too, with a state for each remainder. What is not found here meets the limits of
the child that compiles it (`compiler.py`), which can only say that it was too much.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from math import lcm
from typing import Any

from server.grammar.schema_closure import Schema, children, placed

MAX_PATTERN_CHARACTERS = 4096
MAX_EXPANSION = 2_000
"""What counted repetitions may add to a pattern: each further thousand costs every token of the answer some 2 ms."""
MAX_PATTERNS_AT_ONCE = 8
"""Patterns that one text has to match: llguidance takes 7 ms to combine 8, a quarter second for 12, minutes for 16."""
MAX_DIVISOR = 100_000
"""Of a divisor without its decimal point and its zeros at the end: 100,003 takes 0.2 s and 25 MB, 1,000,003 takes 6 s
and 300 MB. The same holds for the least common multiple of divisors that one number has to satisfy."""
MAX_ROUNDS = 30

# Every piece may also end with the pattern: otherwise a search for a missing end would start again at each character.
_PIECE = re.compile(
    r"""
      \\(?:[pPux]\{[^}]{0,64}\}|.|$)       # an escape, also of a class or of a code point
    | \[\^?\]?(?:\\.|[^\]\\])*(?:\]|\\?$)  # a set
    | (?P<open>\((?:\?(?:P?<[^>)]{0,64}>|[a-zA-Z^-]{0,16}:))?)
    | (?P<close>\))
    | \{(?P<least>\d+)(?:,(?P<most>\d*))?\}[?+]?
    | (?P<repeat>[*+?])
    | .
    """,
    re.VERBOSE | re.DOTALL,
)
_LAYERS = frozenset(("$ref", "allOf", "anyOf", "oneOf"))


def expansion(pattern: str) -> int:
    """How much longer a pattern is with its counted repetitions written out: ``(ab{3}){2}`` counts as 10, less the 10
    that it is long."""
    sums, last = [0], 0
    for piece in _PIECE.finditer(pattern):
        if piece["open"]:
            sums.append(0)
            last = 0
        elif piece["close"]:
            last = sums.pop() + 1 if len(sums) > 1 else 1
            sums[-1:] = [sums[-1] + last] if sums else [last]
        elif piece["least"]:
            times = max(int(piece["least"][:9]), int((piece["most"] or "0")[:9]), 1)
            sums[-1] += last * (times - 1)
            last *= times
        elif not piece["repeat"]:
            last = 1
            sums[-1] += 1
    return max(0, sum(sums) - len(pattern))


def costly(document: Schema) -> list[tuple[Schema, str]]:
    """What is too costly in a converted schema: keywords, each with the schema that it stands in. Where only several
    together are, these are all patterns and formats, or all divisors; empty if nothing is too costly."""
    schemas = [schema for _, schema in placed(document)]
    alone = [
        (schema, name)
        for schema in schemas
        for name, is_too_much in _TOO_MUCH.items()
        if name in schema and any(map(is_too_much, schema[name] if name == "patternProperties" else [schema[name]]))
    ]
    if alone:
        return alone
    if not _stays_below(MAX_PATTERNS_AT_ONCE, document, _patterns_in, sum):
        return [(schema, name) for schema in schemas for name in ("pattern", "format") if name in schema]
    if not _stays_below(MAX_DIVISOR, document, _divisor_in, lambda divisors: lcm(*divisors)):
        return [(schema, "multipleOf") for schema in schemas if "multipleOf" in schema]
    return []


def _is_long(pattern: str) -> bool:
    return len(pattern) > MAX_PATTERN_CHARACTERS or expansion(pattern) > MAX_EXPANSION


_TOO_MUCH: dict[str, Callable[[Any], bool]] = {
    "pattern": _is_long,
    "patternProperties": _is_long,
    "multipleOf": lambda divisor: _digits(divisor) > MAX_DIVISOR,
}


def _digits(divisor: int | float) -> int:
    """1.50 is 15, and 3600 is 36."""
    return int("".join(map(str, Decimal(repr(divisor)).normalize().as_tuple().digits)))


def _patterns_in(schema: Schema) -> int:
    return ("pattern" in schema) + ("format" in schema)


def _divisor_in(schema: Schema) -> int:
    return _digits(schema["multipleOf"]) if "multipleOf" in schema else 1


def _stays_below(
    most: int, document: Schema, own: Callable[[Schema], int], together: Callable[[Iterable[int]], int]
) -> bool:
    """Whether no value has to satisfy more than ``most`` at once, as far as a few rounds can show.

    ``own`` is what a schema itself asks for, ``together`` combines what several schemas of one value ask for.
    """
    parts = [schema for _, schema in placed(document)]
    if not any("allOf" in part or (len(part) > 1 and _LAYERS & part.keys()) for part in parts):
        return True
    definitions: dict[str, Any] = document.get("$defs", {})
    known = dict.fromkeys(definitions, together(()))

    def at_once(schema: Any) -> int:
        if not isinstance(schema, dict):
            return together(())
        groups: dict[str, list[int]] = {"allOf": [], "anyOf": [], "oneOf": [], "": []}
        for step, child in children(schema):
            keyword = step[1:6]
            groups[keyword if keyword in groups else ""].append(at_once(child))
        referred = known.get(schema.get("$ref", "").rpartition("/")[2], together(()))
        alternatives = [max(group) for name, group in groups.items() if group and name != "allOf"]
        return together([own(schema), referred, *groups["allOf"], *alternatives])

    for _ in range(MAX_ROUNDS):
        found = {name: at_once(schema) for name, schema in definitions.items()}
        if max([at_once(document), *found.values()]) > most:
            return False
        if found == known:
            return True
        known.update(found)
    return False

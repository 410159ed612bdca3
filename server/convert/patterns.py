"""How much a regular expression expands to: what no limit of llguidance bounds before it has cost seconds."""

from __future__ import annotations

import re
from typing import Any

from server.convert.shape import Schema, children, placed

MAX_EXPANSION = 2_000
"""What counted repetitions may add to a pattern: each further thousand costs every token of the answer some 2 ms."""

_PIECE = re.compile(
    r"""
      \\(?:[pPux]\{[^}]*\}|.)       # an escape, also of a class or of a code point
    | \[\^?\]?(?:\\.|[^\]\\])*\]    # a set
    | (?P<open>\((?:\?(?:P?<[^>]*>|[^:)]*:))?)
    | (?P<close>\))
    | \{(?P<least>\d+)(?:,(?P<most>\d*))?\}[?+]?
    | (?P<repeat>[*+?])
    | .
    """,
    re.VERBOSE | re.DOTALL,
)


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


MAX_PATTERNS_AT_ONCE = 8
"""Patterns that one text has to match: llguidance takes 7 ms to combine 8, a quarter second for 12, minutes for 16."""

MAX_ROUNDS = 30


def pattern_problem(document: Schema) -> tuple[str, str] | None:
    """The path and the description of what is too costly in the patterns of a converted schema; None if nothing is."""
    for place, schema in placed(document):
        names = [*schema.get("patternProperties", ()), *([schema["pattern"]] if "pattern" in schema else [])]
        size = max(map(expansion, names), default=0)
        if size > MAX_EXPANSION:
            where = ".pattern" if expansion(schema.get("pattern", "")) == size else ".patternProperties"
            return place + where, f"its repetitions add {size} characters when written out; at most {MAX_EXPANSION} may"
    if not _settles(document):
        return "", f"makes one text match more than {MAX_PATTERNS_AT_ONCE} patterns at once"
    return None


def _settles(document: Schema) -> bool:
    """Whether it takes few rounds to see that no place has to match too many patterns."""
    if not any("allOf" in schema or ("$ref" in schema and len(schema) > 1) for _, schema in placed(document)):
        return True
    definitions: dict[str, Any] = document.get("$defs", {})
    known = dict.fromkeys(definitions, 0)
    for _ in range(MAX_ROUNDS):
        found = {name: _at_once(schema, known) for name, schema in definitions.items()}
        if max([_at_once(document, found), *found.values()]) > MAX_PATTERNS_AT_ONCE:
            return False
        if found == known:
            return True
        known = found
    return False


def _at_once(schema: Any, known: dict[str, int]) -> int:
    """How many patterns one value may have to match, given that number for each definition."""
    if not isinstance(schema, dict):
        return 0
    count = ("pattern" in schema) + ("format" in schema)
    count += known.get(schema.get("$ref", "").rpartition("/")[2], 0)
    groups: dict[str, list[int]] = {"allOf": [], "anyOf": [], "oneOf": [], "": []}
    for step, child in children(schema):
        keyword = step[1:6]
        groups[keyword if keyword in groups else ""].append(_at_once(child, known))
    return count + sum(groups.pop("allOf")) + sum(max(group, default=0) for group in groups.values())

"""Checks finished answers against the whole of their schemas, for what their grammars could not enforce.

A check may take long, or much memory: the server runs it in children only (`compiler.py`). Patterns are matched in time
linear in the text, formats only inform, and nothing is fetched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from server.grammar.schema import complete
from server.grammar.schema_dialects import NO_EFFECT, SchemaDialect
from server.grammar.schema_reader import step
from server.wire.json_schema import LISTS_OF_SCHEMAS, MAPS_OF_SCHEMAS, SCHEMAS, VALUE_KEYWORDS

PATTERN_BYTES = 1_000_000
"""Of a compiled pattern."""
MAX_PLACE = 256
"""Characters of a place that are shown."""

_KEYWORDS = frozenset((*NO_EFFECT, *VALUE_KEYWORDS, *SCHEMAS, *LISTS_OF_SCHEMAS, *MAPS_OF_SCHEMAS))
_BESIDE_PATTERNS = ("patternProperties", "additionalProperties", "unevaluatedProperties")


def checkable(schema: Any, dialect: SchemaDialect) -> tuple[str, list[str]]:
    """What `violation` takes for a schema that was read before, and the paths of the patterns that it does not check;
    "" where the library does not take the schema."""
    import jsonschema_rs

    document, schemas = complete(schema, dialect)
    unchecked = []
    for inner, path in schemas:
        if not is_linear(inner.get("pattern", "")):
            del inner["pattern"]
            unchecked.append(f"{path}.pattern")
        if not all(map(is_linear, inner.get("patternProperties", ()))):
            for keyword in _BESIDE_PATTERNS:
                inner.pop(keyword, None)
            unchecked.append(f"{path}.patternProperties")
    written = json.dumps(document)
    try:
        _validator(written)
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError):
        return "", unchecked
    return written, unchecked


def violation(schema: str, value: str) -> tuple[str, str] | None:
    """The keyword of a schema (see `checkable`) that a value, as JSON, does not satisfy, and the place in the value;
    None if it satisfies all, "" and "" if it is no JSON."""
    try:
        read = json.loads(value)
    except ValueError:
        return "", ""
    error = next(_validator(schema).iter_errors(read), None)
    if error is None:
        return None
    named = [name for name in error.schema_path if name in _KEYWORDS]
    # What is wrong with a name says little without the keyword that asks for it.
    keyword = "propertyNames" if error.kind.name == "propertyNames" else str(named[-1]) if named else "false"
    place = "".join(f"[{name}]" if isinstance(name, int) else step(name) for name in error.instance_path)
    return keyword, place.removeprefix(".")[:MAX_PLACE]


@lru_cache(maxsize=1024)
def is_linear(pattern: str) -> bool:
    """Whether a pattern can be matched in linear time."""
    return _takes(pattern, linear=True)


def is_pattern(pattern: str) -> bool:
    """Whether a pattern is one at all; some, such as those that look ahead, cannot be matched in linear time."""
    return _takes(pattern, linear=True) or _takes(pattern, linear=False)


def _takes(pattern: str, linear: bool) -> bool:
    import jsonschema_rs

    kind: Callable[..., Any] = jsonschema_rs.RegexOptions if linear else jsonschema_rs.FancyRegexOptions
    options = kind(size_limit=PATTERN_BYTES, dfa_size_limit=PATTERN_BYTES)
    try:
        jsonschema_rs.Draft202012Validator({"pattern": pattern}, pattern_options=options)
    except jsonschema_rs.ValidationError:
        return False
    return True


@lru_cache(maxsize=8)
def _validator(schema: str) -> Any:
    import jsonschema_rs

    options = jsonschema_rs.RegexOptions(size_limit=PATTERN_BYTES, dfa_size_limit=PATTERN_BYTES)
    return jsonschema_rs.Draft202012Validator(
        json.loads(schema), validate_formats=False, offline=True, pattern_options=options
    )


def checkable_all(schemas: Sequence[tuple[Any, SchemaDialect]]) -> list[tuple[str, list[str]]]:
    """`checkable` for each of several schemas."""
    return [checkable(schema, dialect) for schema, dialect in schemas]


def first_violation(checks: Sequence[tuple[str, str]]) -> tuple[int, str, str] | None:
    """Which of several values (`violation`) is the first that its schema does not allow, with keyword and place."""
    for index, (schema, value) in enumerate(checks):
        found = violation(schema, value)
        if found is not None:
            return index, *found
    return None

"""The shape of schemas as a whole: how large they may be, which objects are closed, whether a finite value matches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from server.errors import InvalidArgument
from server.wire.json_schema import LISTS_OF_SCHEMAS, MAPS_OF_SCHEMAS, SCHEMAS

MAX_DEPTH = 600
"""Levels of a schema and of all that it refers to, together: beyond some 1600, llguidance overruns the stack of a
thread, which ends the process."""

Schema = dict[str, Any]


def children(schema: Schema) -> Iterator[tuple[str, Any]]:
    """The schemas directly within a converted schema, with their paths; definitions are not among them."""
    for keyword in SCHEMAS:
        if keyword in schema:
            yield f".{keyword}", schema[keyword]
    for keyword in LISTS_OF_SCHEMAS:
        yield from ((f".{keyword}[{index}]", item) for index, item in enumerate(schema.get(keyword, ())))
    for keyword in MAPS_OF_SCHEMAS:
        yield from ((f".{keyword}.{name}", item) for name, item in schema.get(keyword, {}).items())


def placed(document: Schema) -> Iterator[tuple[str, Schema]]:
    """Every schema of a converted document that is not just true or false, with its path."""
    left: list[tuple[str, Any]] = [("", document)]
    left += [(f".$defs.{name}", schema) for name, schema in document.get("$defs", {}).items()]
    while left:
        place, schema = left.pop()
        if isinstance(schema, dict):
            yield place, schema
            left += [(place + step, child) for step, child in children(schema)]


def check_depth(document: Schema, field: str) -> None:
    """Raises ``InvalidArgument`` for a converted document that takes too many levels to follow."""
    levels = sum(map(_depth, (document, *document.get("$defs", {}).values())))
    if levels > MAX_DEPTH:
        raise InvalidArgument.at(
            field, f"{field}: the schema and its definitions have {levels} levels, but at most {MAX_DEPTH} are followed"
        )


def close_objects(document: Schema) -> Schema:
    """Objects that declare properties without mentioning others allow no others: what people mean by a schema.

    Every answer still matches the schema as it was sent. Where schemas are combined (``allOf``, or a
    reference or choice beside what an object must have) nothing is closed: one half would forbid the other's
    properties. The same holds where ``oneOf`` has branches that only their closing would tell apart.
    """
    parts = [schema for _, schema in placed(document)]
    definitions = document.get("$defs", {})
    if not any(_is_composed(part) or not _has_discriminator(part, definitions) for part in parts):
        for part in parts:
            declared = part.get("properties") or {}
            is_open = part.keys() & {"additionalProperties", "patternProperties"}
            needs_no_other = set(part.get("required", ())) <= declared.keys()
            if declared and not is_open and needs_no_other and part.get("minProperties", 0) <= len(declared):
                part["additionalProperties"] = False
    return document


def has_no_finite_value(document: Schema) -> bool:
    """Whether every value that matches would be infinite, like a list node with a required next."""
    definitions: dict[str, Any] = document.get("$defs", {})
    finite: set[str] = set()
    while True:
        found = {name for name, schema in definitions.items() if name not in finite and _ends(schema, finite)}
        if not found:
            return not _ends(document, finite)
        finite |= found


def _depth(schema: Any) -> int:
    if not isinstance(schema, dict):
        return 1
    return 1 + max((_depth(child) for _, child in children(schema)), default=0) + ("$ref" in schema)


_OF_OBJECTS = {"properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"}


def _is_composed(schema: Schema) -> bool:
    parts = sum(len(schema.get(keyword, ())) > 1 for keyword in ("allOf",)) * 2
    parts += sum(keyword in schema for keyword in ("$ref", "anyOf", "oneOf", "allOf"))
    return parts > 1 or (parts == 1 and not _OF_OBJECTS.isdisjoint(schema))


def _has_discriminator(schema: Schema, definitions: Schema) -> bool:
    """Whether the branches of ``oneOf`` differ in type, or all in a property that they require."""
    branches = [_resolved(branch, definitions) for branch in schema.get("oneOf", ())]
    kinds = [branch.get("type") for branch in branches]
    if "object" not in kinds or len(branches) < 2:
        return True
    objects = [branch for branch in branches if branch.get("type", "object") == "object"]
    marks = [_marks(branch) for branch in objects]
    shared = set[str].intersection(*map(set, marks)) if marks else set()
    groups = ([mark[name] for mark in marks] for name in shared)
    disjoint = (len(set().union(*group)) == sum(map(len, map(set, group))) for group in groups)
    return len(objects) < 2 or any(disjoint)


def _resolved(schema: Any, definitions: Schema) -> Schema:
    if not isinstance(schema, dict):
        return {}
    found = definitions.get(schema.get("$ref", "").rpartition("/")[2], schema)
    return found if isinstance(found, dict) else {}


def _marks(schema: Schema) -> dict[str, list[str]]:
    """The required properties that can only have certain values, with these as text."""
    marks = {}
    for name in schema.get("required", ()):
        declared = schema.get("properties", {}).get(name)
        if isinstance(declared, dict) and ("const" in declared or "enum" in declared):
            values = declared["enum"] if "enum" in declared else [declared["const"]]
            marks[name] = [json.dumps(value) for value in values]
    return marks


def _ends(schema: Any, finite: set[str]) -> bool:
    """Whether some value of the schema is finite, given the definitions that are known to have one."""
    if not isinstance(schema, dict):
        return bool(schema)
    if "enum" in schema or "const" in schema:
        return True
    if "$ref" in schema and schema["$ref"].rpartition("/")[2] not in finite:
        return False
    if not all(_ends(part, finite) for part in schema.get("allOf", ())):
        return False
    for choice in ("anyOf", "oneOf"):
        if choice in schema and not any(_ends(part, finite) for part in schema[choice]):
            return False
    given = schema.get("type")
    kinds = {given} if isinstance(given, str) else set(given or ("null",))
    if "object" in kinds:
        needed = [schema.get("properties", {}).get(name, True) for name in schema.get("required", ())]
        if all(_ends(value, finite) for value in needed):
            return True
    if "array" in kinds:
        least, first = schema.get("minItems", 0), schema.get("prefixItems", ())
        needed = [*first[:least], *([schema.get("items", True)] if least > len(first) else [])]
        if all(_ends(item, finite) for item in needed):
            return True
    return bool(kinds - {"object", "array"})

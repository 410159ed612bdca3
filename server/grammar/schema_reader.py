"""Reads a caller's schema as current JSON Schema: once as far as a grammar can enforce it, or complete.

What llguidance gets wrong is converted first: types in upper case, numbers as strings, ``nullable`` and
``propertyOrdering`` (both silently ignored), ``$schema``, formats that it does not know. References are resolved
here, so that the result holds ``#/$defs/…`` and nothing that was never checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from server.errors import FieldViolation
from server.grammar.schema_closure import Schema
from server.grammar.schema_dialects import (
    FORMATS,
    MAPS_OF_SUBSCHEMAS,
    NO_EFFECT,
    STORAGE_FORMATS,
    SUBSCHEMAS,
    UNCHECKED,
    UNENFORCED_VALUES,
    VALUES,
    BadValue,
    SchemaDialect,
    number,
)
from server.wire.fields import shown
from server.wire.json_schema import LISTS_OF_SCHEMAS

_CONDITIONAL = ("if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_$-]{1,64}")


def step(name: str) -> str:
    """A name as a step of a path: callers choose it, and paths go into headers."""
    return f".{name}" if _PLAIN_NAME.fullmatch(name) else f"[{shown(name)}]"


class SchemaReader:
    """Reads one schema and everything that it refers to; ``complete`` includes what no grammar can enforce.

    Problems are collected, not raised. ``schemas`` are all that were read, with their paths. ``unenforced`` are the
    paths of what the result lacks, and whether a complete reading has it.
    """

    def __init__(self, root: Any, field: str, dialect: SchemaDialect, complete: bool = False) -> None:
        self.problems: list[FieldViolation] = []
        self.schemas: list[tuple[Schema, str]] = []
        self.unenforced: dict[str, bool] = {}
        self._root = root
        self._field = field
        self._dialect = dialect
        self._complete = complete
        self._names: dict[str, str] = {}
        self._waiting: list[tuple[str, Any]] = []

    def document(self) -> Schema:
        """The whole schema, with what it refers to in its ``$defs``."""
        converted = self._schema(self._root, self._field)
        definitions: Schema = {}
        while self._waiting:
            pointer, schema = self._waiting.pop()
            path = self._field + "".join(map(step, pointer.split("/")[1:]))
            definitions[self._names[pointer]] = self._schema(schema, path)
        if isinstance(converted, bool):
            if not converted:
                self._problem(self._field, "no value can match false")
            converted = {}
        if definitions:
            converted["$defs"] = definitions
        return converted

    def _schema(self, schema: Any, path: str) -> Schema | bool:
        if isinstance(schema, bool) and self._dialect.open_ended:
            return {} if schema else False
        if not isinstance(schema, dict):
            self._problem(path, f"is {shown(schema)}, but must be a schema")
            return {}
        found: Schema = {}
        for key, value in schema.items():
            place, keyword = path + step(key), self._dialect.names.get(key)
            if value is None and not self._dialect.open_ended:
                continue
            if keyword is None:
                if not (self._dialect.open_ended or key in self._dialect.annotations or key.startswith("x-")):
                    text = f"Invalid JSON payload received. Unknown name {shown(key)} at '{path}': Cannot find field."
                    self.problems.append(FieldViolation(path, text))
                elif key == "$id" and path != self._field:  # would be the base of references
                    self.unenforced[place] = False
            elif keyword in UNCHECKED or (keyword in NO_EFFECT and not self._complete):
                # Python takes False for 0, JSON does not.
                if not any(type(value) is type(other) and value == other for other in NO_EFFECT[keyword]):
                    self.unenforced[place] = keyword not in UNCHECKED
            elif keyword in found:
                self._problem(place, "is given twice")
            else:
                try:
                    found[keyword] = self._value(keyword, value, place)
                except BadValue as error:
                    self._problem(place, str(error))
        if not self._complete and found.get("properties"):
            # Objects that declare properties are closed, but these may come too.
            for name in _mentioned({key: schema[key] for key in _CONDITIONAL if key in schema}):
                found["properties"].setdefault(name, {})
        return self._settled(found, path)

    def _value(self, keyword: str, value: Any, path: str) -> Any:
        if keyword == "$ref":
            return self._reference(value)
        if keyword == "items" and isinstance(value, list):
            return self._listed(value, path)
        if isinstance(value, bool) and keyword in SUBSCHEMAS and keyword not in ("items", "additionalItems"):
            return value
        if keyword == "dependencies":
            if not isinstance(value, dict):
                raise BadValue(f"is {shown(value)}, but must map names to names or schemas")
            return {
                name: VALUES["required"](needs) if isinstance(needs, list) else self._schema(needs, path + step(name))
                for name, needs in value.items()
            }
        if keyword in SUBSCHEMAS:
            return self._schema(value, path)
        if keyword in LISTS_OF_SCHEMAS:
            return self._listed(value, path)
        if keyword in MAPS_OF_SUBSCHEMAS:
            if not isinstance(value, dict):
                raise BadValue(f"is {shown(value)}, but must map names to schemas")
            return {name: self._schema(schema, path + step(name)) for name, schema in value.items()}
        return (VALUES[keyword] if keyword in VALUES else UNENFORCED_VALUES[keyword])(value)

    def _listed(self, value: Any, path: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise BadValue("must be a list of at least one schema")
        return [self._schema(schema, f"{path}[{index}]") for index, schema in enumerate(value)]

    def _reference(self, value: Any) -> str:
        """The new place of what a reference points to; it is read later."""
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            raise BadValue(f"is {shown(value)}, but only references within the schema, as #/$defs/name, are followed")
        pointer = value[1:]
        if pointer not in self._names:
            target = _pointed(self._root, pointer)
            # A name that needs no escapes and that people recognise from what they sent.
            name = re.sub(r"[^A-Za-z0-9_]", "_", pointer.rpartition("/")[2]) or "root"
            self._names[pointer] = name if name not in self._names.values() else f"{name}_{len(self._names)}"
            self._waiting.append((pointer, target))
        return f"#/$defs/{self._names[pointer]}"

    def _problem(self, path: str, description: str) -> None:
        self.problems.append(FieldViolation(path, f"{path}: {description}"))

    def _settled(self, found: Schema, path: str) -> Schema:
        """Rewrites keywords that affect each other as current JSON Schema."""
        if not self._dialect.open_ended:
            _infer_type(found)
        if found.get("type", "") in (None, []):
            del found["type"]
        if found.get("format") not in FORMATS and found.pop("format", "enum") not in STORAGE_FORMATS:
            self.unenforced[f"{path}.format"] = False
        _modernise(found)
        if self._dialect.nullable and found.get("type") in ("integer", "number") and "enum" in found:
            try:  # the ``Schema`` message can hold the choices of a number only as strings
                found["enum"] = [value if value is None else number(value) for value in found["enum"]]
            except BadValue as error:
                self._problem(f"{path}.enum", f"holds a value that {error}")
        self._order(found, path)
        # JSON may repeat a name, and readers take the last: only names that are required count for certain.
        if not self._complete and found.pop("minProperties", 0) > len(found.get("required", ())):
            self.unenforced[f"{path}.minProperties"] = True
        if not self._dialect.one_of:
            as_any_of(found)
        is_nullable = found.pop("nullable", False)
        self.schemas.append((found, path))
        return {"anyOf": [found, {"type": "null"}]} if is_nullable else found

    def _order(self, found: Schema, path: str) -> None:
        """The order of properties is the order in which they are written."""
        order = found.pop("propertyOrdering", None)
        properties = found.get("properties")
        if not order or properties is None:
            return
        unknown = [name for name in order if name not in properties]
        if unknown:
            self._problem(f"{path}.propertyOrdering", f"names {shown(unknown[0])}, which is not a property")
        first = {name: properties[name] for name in order if name in properties}
        found["properties"] = first | properties


def as_any_of(schema: Schema) -> None:
    """``oneOf`` as ``anyOf``."""
    branches = schema.pop("oneOf", None)
    if branches is not None and "anyOf" in schema:
        schema["allOf"] = [*schema.get("allOf", ()), {"anyOf": branches}]
    elif branches is not None:
        schema["anyOf"] = branches


def _mentioned(schema: Any) -> Iterator[str]:
    """The properties that a caller's schema, or one that it consists of, declares or requires."""
    if not isinstance(schema, dict):
        return
    properties, required = schema.get("properties"), schema.get("required")
    yield from properties if isinstance(properties, dict) else ()
    yield from (name for name in required if isinstance(name, str)) if isinstance(required, list) else ()
    for key in (*_CONDITIONAL, *LISTS_OF_SCHEMAS):
        inner = schema.get(key)
        if key.startswith("depend") and isinstance(inner, dict):
            inner = [{"required": part} if isinstance(part, list) else part for part in inner.values()]
        for part in inner if isinstance(inner, list) else [inner]:
            yield from _mentioned(part)


def _pointed(root: Any, pointer: str) -> Any:
    """What a JSON pointer names. SDKs write ``$defs`` with and without its dollar sign."""
    place = root
    for step in pointer.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(place, dict):
            found = next((key for key in (name, name.lstrip("$"), f"${name}") if key in place), None)
            place = place[found] if found is not None else BadValue
        elif isinstance(place, list) and name.isdecimal() and int(name) < len(place):
            place = place[int(name)]
        else:
            place = BadValue
        if place is BadValue:
            raise BadValue(f'is "#{pointer}", which is not in the schema')
    return place


def _infer_type(found: Schema) -> None:
    """A ``Schema`` without a type is of the type that its keywords speak of."""
    if found.get("type") is None and not {"anyOf", "oneOf", "allOf", "$ref", "enum", "const"} & found.keys():
        signs = {"properties": "object", "items": "array", "prefixItems": "array", "pattern": "string"}
        kinds = [kind for sign, kind in signs.items() if sign in found]
        if kinds:
            found["type"] = kinds[0]


def _modernise(found: Schema) -> None:
    """Rewrites what older drafts wrote differently.

    Before 2020, ``items`` was a list for tuples and ``additionalItems`` the schema of the rest; before 2019,
    ``dependencies`` were names or schemas; before that, ``exclusiveMinimum`` was a flag beside ``minimum``.
    """
    for name, needs in found.pop("dependencies", {}).items():
        kind = "dependentRequired" if isinstance(needs, list) else "dependentSchemas"
        found[kind] = {name: needs, **found.get(kind, {})}
    rest = found.pop("additionalItems", None)
    if isinstance(found.get("items"), list):
        found["prefixItems"] = found.pop("items")
        if rest is not None:
            found["items"] = rest
    for limit, strict in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(found.get(strict), bool) and found.pop(strict) and limit in found:
            found[strict] = found.pop(limit)

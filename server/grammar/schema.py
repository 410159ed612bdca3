"""Converts callers' schemas to JSON Schema that llguidance enforces exactly, or names the path of what it cannot.

What llguidance gets wrong is converted first: types in upper case, numbers as strings, ``nullable`` and
``propertyOrdering`` (both silently ignored), ``$schema``, formats that it does not know. References are resolved
here, so that the result holds ``#/$defs/…`` and nothing that was never checked.
"""

from __future__ import annotations

import re
from typing import Any

from server.errors import FieldViolation, InvalidArgument
from server.grammar.regex_cost import costly, forget_costly
from server.grammar.schema_closure import check_depth, close_objects, has_no_finite_value
from server.grammar.schema_dialects import (
    FORMATS,
    JSON_SCHEMA,
    NO_EFFECT,
    OPENAPI,
    RELAXED,
    VALUES,
    BadValue,
    SchemaDialect,
    number,
)
from server.wire.fields import shown
from server.wire.json_schema import LISTS_OF_SCHEMAS, MAPS_OF_SCHEMAS, SCHEMAS, check_size
from server.wire.support import joined

Schema = dict[str, Any]


def json_schema(schema: Any, field: str) -> Schema:
    """A JSON Schema of which every constraint can be enforced. Annotations and unknown keywords are left out.

    ``field`` is the path of the schema in the request. Raises ``InvalidArgument`` with the path of each problem.
    """
    return _strict(schema, field, JSON_SCHEMA)


def openapi_schema(schema: Any, field: str) -> Schema:
    """A ``Schema`` message (a subset of OpenAPI 3.0) as JSON Schema. Raises ``InvalidArgument``: see `json_schema`."""
    return _strict(schema, field, OPENAPI)


def relaxed_schema(schema: Any) -> Schema:
    """The parameters of a function, as a schema of either kind, as far as they can be enforced; never refuses.

    The result is always an object's schema. It is not compiled here: `llguidance.repaired` does that too.
    """
    try:
        check_size(schema, "parameters")
        reader = _Reader(schema, "parameters", RELAXED)
        document = close_objects(reader.document())
        check_depth(document, "parameters")
    except InvalidArgument:
        return {"type": "object"}
    forget_costly(document)
    sound = not has_no_finite_value(document) and costly(document) is None
    usable = sound and document.get("type", "object") == "object"
    return {"type": "object", **document} if usable else {"type": "object"}


def _strict(schema: Any, field: str, dialect: SchemaDialect) -> Schema:
    check_size(schema, field)
    reader = _Reader(schema, field, dialect)
    document = close_objects(reader.document())
    if reader.problems:
        raise joined(reader.problems)
    check_depth(document, field)
    problem = costly(document)
    if problem is not None:
        place = field + problem[0]
        raise InvalidArgument.at(place, f"{place}: {problem[1]}")
    if has_no_finite_value(document):
        raise InvalidArgument.at(field, f"{field}: no finite value can match this schema")
    return document


class _Reader:
    """Reads one schema and everything that it refers to. Problems are collected, not raised."""

    def __init__(self, root: Any, field: str, dialect: SchemaDialect) -> None:
        self.problems: list[FieldViolation] = []
        self._root = root
        self._field = field
        self._dialect = dialect
        self._names: dict[str, str] = {}
        self._waiting: list[tuple[str, Any]] = []

    def document(self) -> Schema:
        """The whole schema, with what it refers to in its ``$defs``."""
        converted = self._schema(self._root, self._field)
        definitions: Schema = {}
        while self._waiting:
            pointer, schema = self._waiting.pop()
            definitions[self._names[pointer]] = self._schema(schema, self._field + pointer.replace("/", "."))
        if isinstance(converted, bool):
            if not converted:
                self._problem(self._field, "no value can match false")
            converted = {}
        return {**converted, "$defs": definitions} if definitions else converted

    def _schema(self, schema: Any, path: str) -> Schema | bool:
        if isinstance(schema, bool) and self._dialect.open_ended:
            return {} if schema else False
        if not isinstance(schema, dict):
            self._problem(path, f"is {shown(schema)}, but must be a schema")
            return {}
        found: Schema = {}
        for key, value in schema.items():
            if value is None and not self._dialect.open_ended:
                continue
            keyword = self._dialect.names.get(key)
            if keyword is None:
                self._unenforced(key, value, path)
            elif keyword in found:
                self._problem(f"{path}.{key}", "is given twice")
            else:
                try:
                    found[keyword] = self._value(keyword, value, f"{path}.{key}")
                except BadValue as error:
                    self._problem(f"{path}.{key}", str(error))
        return self._settled(found, path)

    def _unenforced(self, key: str, value: Any, path: str) -> None:
        """A keyword that is not enforced: an annotation, or a problem."""
        if self._dialect.open_ended:
            # Python takes False for 0, JSON does not.
            harmless = any(type(value) is type(other) and value == other for other in NO_EFFECT.get(key, ()))
            if key in NO_EFFECT and not harmless:
                self._problem(f"{path}.{key}", "cannot be enforced; leave it out, or check the answer yourself")
            elif key == "$id" and path != self._field:
                self._problem(f"{path}.{key}", "cannot be honoured below the top of a schema")
        elif key not in self._dialect.annotations:
            text = f"Invalid JSON payload received. Unknown name {shown(key)} at '{path}': Cannot find field."
            self.problems.append(FieldViolation(path, text))

    def _value(self, keyword: str, value: Any, path: str) -> Any:
        if keyword == "$ref":
            return self._reference(value)
        if keyword == "items" and isinstance(value, list):
            return self._listed(value, path)
        if keyword == "additionalProperties" and isinstance(value, bool):
            return value
        if keyword in SCHEMAS:
            return self._schema(value, path)
        if keyword in LISTS_OF_SCHEMAS:
            return self._listed(value, path)
        if keyword in MAPS_OF_SCHEMAS:
            if not isinstance(value, dict):
                raise BadValue(f"is {shown(value)}, but must map names to schemas")
            return {name: self._schema(schema, f"{path}.{name}") for name, schema in value.items()}
        return VALUES[keyword](value)

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
        if found.get("format") not in FORMATS:
            found.pop("format", None)
        _modernise(found)
        if self._dialect.nullable and found.get("type") in ("integer", "number") and "enum" in found:
            try:  # the ``Schema`` message can hold the choices of a number only as strings
                found["enum"] = [value if value is None else number(value) for value in found["enum"]]
            except BadValue as error:
                self._problem(f"{path}.enum", f"holds a value that {error}")
        self._order(found, path)
        # JSON may repeat a name, and readers take the last: only names that are required count for certain.
        if found.pop("minProperties", 0) > len(found.get("required", ())):
            self._problem(
                f"{path}.minProperties", "cannot be enforced above the number of required properties; name them"
            )
        if self._dialect.relaxed and "oneOf" in found:
            found["anyOf"] = [*found.get("anyOf", ()), *found.pop("oneOf")]
        return {"anyOf": [found, {"type": "null"}]} if found.pop("nullable", False) else found

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
    if found.get("type") is None and not {"anyOf", "$ref", "enum"} & found.keys():
        signs = {"properties": "object", "items": "array", "prefixItems": "array", "pattern": "string"}
        kinds = [kind for sign, kind in signs.items() if sign in found]
        if kinds:
            found["type"] = kinds[0]


def _modernise(found: Schema) -> None:
    """Rewrites what older drafts wrote differently.

    Before 2020, ``items`` was a list for tuples and ``additionalItems`` the schema of the rest; before 2019,
    ``exclusiveMinimum`` was a flag beside ``minimum``.
    """
    rest = found.pop("additionalItems", None)
    if isinstance(found.get("items"), list):
        found["prefixItems"] = found.pop("items")
        if rest is not None:
            found["items"] = rest
    for limit, strict in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(found.get(strict), bool) and found.pop(strict) and limit in found:
            found[strict] = found.pop(limit)

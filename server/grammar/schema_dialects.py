"""The keywords of schemas: what each means, which are enforced, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from server.wire.fields import shown
from server.wire.json_schema import LISTS_OF_SCHEMAS, MAPS_OF_SCHEMAS, SCHEMAS, TYPES, VALUE_KEYWORDS

FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"),
)
"""The string formats that are enforced."""
STORAGE_FORMATS = frozenset(("float", "double", "int32", "int64", "enum"))
"""How OpenAPI says that a value is stored: these only inform people."""


NO_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "propertyNames": (True, {}, {"type": "string"}),
    "contains": (),
    "minContains": (),
    "maxContains": (),
    "not": (False,),
    "if": (),
    "then": (),
    "else": (),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "$dynamicRef": (),
    "$recursiveRef": (),
}
"""Keywords that constrain and cannot be enforced, each with the values under which it constrains nothing."""
UNCHECKED = frozenset(("$dynamicRef", "$recursiveRef"))
"""Those among them that are not checked afterwards either: references are resolved once, when a schema is read."""
SUBSCHEMAS = (
    *SCHEMAS,
    *("unevaluatedProperties", "unevaluatedItems", "propertyNames", "contains", "not", "if", "then", "else"),
)
MAPS_OF_SUBSCHEMAS = (*MAPS_OF_SCHEMAS, "dependentSchemas")
"""The keywords that hold schemas, those that cannot be enforced included."""


LARGEST = 2**63 - 1
OUTERMOST = 2**63 - 1024
"""The largest number below 2^63 that a double represents exactly."""
MAX_DIGITS = 64
"""Of a number in a string."""


class BadValue(ValueError):
    """The value of a keyword is not what the keyword takes; the text completes the sentence "it ..."."""


def _type_name(value: Any) -> str | None:
    """A type in any case, or its number; None for "unspecified"."""
    if isinstance(value, str) and value.lower() in TYPES:
        return value.lower()
    if value == "TYPE_UNSPECIFIED":
        return None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= len(TYPES):
        return TYPES[value - 1] if value else None
    raise BadValue(f"is {shown(value)}, but must be one of {', '.join(TYPES)}")


def types(value: Any) -> str | list[str] | None:
    """One type, a list of types, or None for any type."""
    if not isinstance(value, list):
        return _type_name(value)
    if not value:
        raise BadValue("is an empty list, which nothing matches")
    named = [name for name in map(_type_name, value) if name is not None]
    return list(dict.fromkeys(named))


def count(value: Any) -> int:
    """A number of things: an integer from 0 on, also as 3.0 or, as proto3 writes int64, "3"."""
    number_ = number(value)
    if number_ < 0 or number_ != int(number_) or number_ >= 2**63:
        raise BadValue(f"is {shown(value)}, but must be a whole number from 0 on")
    return int(number_)


def number(value: Any) -> int | float:
    """A number of at most 64 bits, also in a string: llguidance reads no larger ones."""
    if isinstance(value, str) and len(value) <= MAX_DIGITS:
        written = value
        for kind in (float, int):  # the last that can read it
            with suppress(ValueError):
                value = kind(written)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -LARGEST <= value <= LARGEST:
        raise BadValue(f"is {shown(value)}, but must be a number from -2^63 + 1 to 2^63 - 1")
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def divisor(value: Any) -> int | float:
    """A number above 0."""
    found = number(value)
    if found <= 0:
        raise BadValue(f"is {shown(value)}, but must be above 0")
    return found


def limit(value: Any, sign: int) -> int | float:
    """A lower (``sign`` -1) or upper (1) limit. One that excludes no readable number becomes the outermost."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value * sign > LARGEST:
        return sign * OUTERMOST
    return number(value)


def exclusive(value: Any, sign: int) -> int | float | bool:
    """A limit, or (before 2019) whether the limit beside it is exclusive."""
    return value if isinstance(value, bool) else limit(value, sign)


def flag(value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise BadValue(f"is {shown(value)}, but must be true or false")
    return value


def text(value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise BadValue(f"is {shown(value)}, but must be a string")
    return value


def texts(value: Any) -> list[str]:
    """A list of strings, each once."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadValue("must be a list of strings")
    return list(dict.fromkeys(value))


def choices(value: Any) -> list[Any]:
    """The values of an enum."""
    if not isinstance(value, list) or not value:
        raise BadValue("must be a list of at least one value")
    return value


def anything(value: Any) -> Any:
    """Any JSON value."""
    return value


def lists_of_names(value: Any) -> dict[str, list[str]]:
    """A list of strings for each name."""
    if not isinstance(value, dict):
        raise BadValue(f"is {shown(value)}, but must map names to lists of names")
    return {name: texts(names) for name, names in value.items()}


VALUES: Mapping[str, Callable[[Any], Any]] = {
    "type": types,
    "enum": choices,
    "const": anything,
    "format": text,
    "pattern": text,
    "required": texts,
    "propertyOrdering": texts,
    "nullable": flag,
    "minimum": partial(limit, sign=-1),
    "maximum": partial(limit, sign=1),
    "exclusiveMinimum": partial(exclusive, sign=-1),
    "exclusiveMaximum": partial(exclusive, sign=1),
    "multipleOf": divisor,
    "minLength": count,
    "maxLength": count,
    "minItems": count,
    "maxItems": count,
    "minProperties": count,
    "maxProperties": count,
}
"""What reads the value of each keyword that holds no schemas. Readers raise ``BadValue``."""

assert VALUES.keys() == VALUE_KEYWORDS

UNENFORCED_VALUES: Mapping[str, Callable[[Any], Any]] = {
    "uniqueItems": flag,
    "minContains": count,
    "maxContains": count,
    "dependentRequired": lists_of_names,
}
"""As ``VALUES``, for the keywords that cannot be enforced."""


@dataclass(frozen=True, slots=True)
class SchemaDialect:
    """How schemas of one kind are read.

    ``names`` maps each accepted spelling to its keyword, ``annotations`` are spellings that only inform people.
    ``open_ended`` says that all other keywords are annotations. ``nullable`` says that ``nullable`` has OpenAPI's
    meaning, ``one_of`` that ``oneOf`` has that of JSON Schema; else it is read as ``anyOf``, which is what SDKs mean
    that write unions with it. ``relaxed``: what is wrong is left out.
    """

    names: Mapping[str, str]
    annotations: frozenset[str] = frozenset()
    open_ended: bool = True
    nullable: bool = True
    one_of: bool = False
    relaxed: bool = False


def _snake(keyword: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in keyword)


_UNENFORCED = {keyword: keyword for keyword in NO_EFFECT}
_JSON_NAMES = {
    keyword: keyword for keyword in (*VALUES, *SCHEMAS, *LISTS_OF_SCHEMAS, *MAPS_OF_SCHEMAS, "$ref", *_UNENFORCED)
}
_BOTH_SPELLINGS = _JSON_NAMES | {_snake(keyword): keyword for keyword in _JSON_NAMES} | {"ref": "$ref"}

OPENAPI = SchemaDialect(
    _BOTH_SPELLINGS,
    frozenset(
        [
            *("title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly"),
            *("$defs", "defs", "definitions", "$schema", "$id", "$comment", "$anchor", "discriminator", "xml"),
            *("externalDocs", "contentEncoding", "contentMediaType"),
        ]
    ),
    open_ended=False,
)
"""The ``Schema`` message: both spellings of each field, the references that Google's SDKs write, and what other SDKs
leave in of JSON Schema."""

JSON_SCHEMA = SchemaDialect(
    {name: keyword for name, keyword in _JSON_NAMES.items() if name != "nullable"}, nullable=False, one_of=True
)
"""JSON Schema, draft 2020-12 and what older drafts wrote differently."""

PARAMETERS = SchemaDialect(_BOTH_SPELLINGS, relaxed=True)
JSON_PARAMETERS = SchemaDialect(_BOTH_SPELLINGS, one_of=True, relaxed=True)
"""The parameters of a function, as ``parameters`` and ``parametersJsonSchema`` have them: either kind of schema."""

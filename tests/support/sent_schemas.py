"""Random schemas as clients send them, over every keyword that answers are held to, bounded so that answers end.

Each is drawn together with the plain JSON Schema that says what was meant: the latter is written here by hand, so that
a mistake in the server's conversion cannot hide in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from jsonschema import Draft202012Validator, FormatChecker

PATTERNS = ("^[a-z]{1,4}$", "^\\d{3}-\\d{2}$", "^(red|green)+$", "^[A-F0-9]{2,6}$", "^a|b$", "x?yz")
FORMATS = ("date", "time", "ipv4", "uuid")
NAMES = ("name", "qty", "é", "a b", 'quo"te', "type", "items", "propertyOrdering", "x-1", "\\")
TEXTS = st.sampled_from(("red", "green", "a/b", "é", "", "null", 'say "hi"', "1"))
SCALARS = st.one_of(TEXTS, st.integers(-99, 99), st.booleans(), st.none(), st.sampled_from((0.5, -2.25)))

Pair = tuple[dict[str, Any], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Sample:
    """A schema as it is sent (``openapi``: in ``responseSchema``, else in ``responseJsonSchema``), and its meaning."""

    openapi: bool
    sent: Any
    meaning: Any

    def problem(self, value: Any) -> str:
        """Why a value does not match; "" if it does."""
        validator = Draft202012Validator(self.meaning, format_checker=FormatChecker(["ipv4", "uuid", "date"]))
        return "; ".join(error.message for error in validator.iter_errors(value))


def samples(count: int) -> SearchStrategy[list[Sample]]:
    """Several schemas, to be answered side by side."""
    return st.lists(sent_schemas(), min_size=count, max_size=count)


@st.composite
def sent_schemas(draw: DrawFn) -> Sample:
    """A schema of either kind, at most three levels deep."""
    drawn = _Drawn(draw, draw(st.booleans()))
    sent, meaning = drawn.schema(3)
    if drawn.refers:
        node = {"type": "object", "properties": {"v": {"type": "boolean"}, "next": _or_null(_NODE)}, "required": ["v"]}
        definitions = {"$defs": {"Node": {**node, "additionalProperties": False}}}
        sent, meaning = {**sent, **definitions}, {**meaning, **definitions}
    return Sample(drawn.openapi, sent, meaning)


_NODE = {"$ref": "#/$defs/Node"}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [{"type": "null"}, schema]}


class _Drawn:
    """Draws pairs: a schema as it is sent, and as JSON Schema."""

    def __init__(self, draw: DrawFn, openapi: bool) -> None:
        self.openapi = openapi
        self.refers = False
        self._draw = draw

    def schema(self, levels: int) -> Pair:
        leaves: list[Callable[[], Pair]] = [self._text, self._number, self._whole, self._choice, self._bare]
        leaves += [] if self.openapi else [self._constant, self._mixed, self._node, self._narrowed]
        inner: list[Callable[[int], Pair]] = [self._object, self._object, self._array, self._any]
        inner += [] if self.openapi else [self._tuple, self._map]
        index = self._draw(st.integers(0, len(leaves) + (len(inner) if levels > 1 else 0) - 1))
        sent, meaning = leaves[index]() if index < len(leaves) else inner[index - len(leaves)](levels - 1)
        sent = {**self._notes(), **sent}
        if self.openapi and self._chance(4):
            return {**sent, "nullable": True}, _or_null(meaning)
        return sent, meaning

    def _chance(self, one_in: int) -> bool:
        return self._draw(st.integers(1, one_in)) == 1

    def _notes(self) -> dict[str, Any]:
        notes = {"title": "T", "description": "what it is", "default": None}
        if not self.openapi:
            notes |= {"examples": [1], "$comment": "c", "x-note": {"not": {}}, "deprecated": True}
        return {key: value for key, value in notes.items() if self._chance(6)}

    def _count(self, value: int) -> int | str:
        return str(value) if self.openapi and self._chance(2) else value

    def _key(self, keyword: str) -> str:
        snake = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in keyword)
        return snake if self.openapi and self._chance(2) else keyword

    def _typed(self, name: str, sent: dict[str, Any], meaning: dict[str, Any] | None = None) -> Pair:
        """Both schemas with their type; what is sent in one of the spellings that are accepted."""
        keys = {self._key(key): value for key, value in sent.items()}
        spelled = name.upper() if self.openapi and self._chance(2) else name
        return {"type": spelled, **keys}, {"type": name, **(sent if meaning is None else meaning)}

    def _text(self) -> Pair:
        kind = self._draw(st.sampled_from(("length", "pattern", "format", "annotation")))
        if kind == "pattern":
            return self._typed("string", {"pattern": self._draw(st.sampled_from(PATTERNS)), "maxLength": 12})
        if kind == "format":
            return self._typed("string", {"format": self._draw(st.sampled_from(FORMATS))})
        least, more = self._draw(st.integers(0, 6)), self._draw(st.integers(0, 6))
        limits = {"minLength": least, "maxLength": least + more}
        sent = {key: self._count(value) for key, value in limits.items()}
        return self._typed("string", sent | ({"format": "made-up"} if kind == "annotation" else {}), limits)

    def _number(self) -> Pair:
        low = self._draw(st.sampled_from((-10, -0.5, 0, 1.25)))
        return self._typed("number", {"minimum": low, "maximum": low + self._draw(st.sampled_from((1, 2.5, 100)))})

    def _whole(self) -> Pair:
        low, size = self._draw(st.integers(-500, 500)), self._draw(st.integers(0, 200))
        limits: dict[str, Any] = {"minimum": low, "maximum": low + size}
        if not self.openapi and size > 14 and self._chance(3):
            limits = {"exclusiveMinimum": low - 1, "maximum": low + size, "multipleOf": 7}
        return self._typed("integer", limits)

    def _choice(self) -> Pair:
        return self._typed("string", {"enum": self._draw(st.lists(TEXTS, min_size=1, max_size=3, unique=True))})

    def _bare(self) -> Pair:
        return self._typed(self._draw(st.sampled_from(("boolean", "null"))), {})

    def _constant(self) -> Pair:
        return _same({"const": self._draw(st.one_of(SCALARS, st.just({"a": [1, None]})))})

    def _mixed(self) -> Pair:
        return _same({"enum": self._draw(st.lists(SCALARS, min_size=1, max_size=3))})

    def _node(self) -> Pair:
        self.refers = True
        return _same(_NODE)

    def _narrowed(self) -> Pair:
        return _same({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 40}]})

    def _object(self, levels: int) -> Pair:
        names = self._draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
        pairs = {name: self.schema(levels) for name in names}
        required = [name for name in names if self._chance(2)]
        sent: dict[str, Any] = {"properties": {name: pair[0] for name, pair in pairs.items()}}
        meaning: dict[str, Any] = {"properties": {name: pair[1] for name, pair in pairs.items()}}
        if required:
            sent["required"] = meaning["required"] = required
        if self._chance(2):
            sent["propertyOrdering"] = self._draw(st.permutations(names))
        if self._chance(3):
            sent["additionalProperties"] = meaning["additionalProperties"] = False
        return self._typed("object", sent, meaning)

    def _array(self, levels: int) -> Pair:
        sent, meaning = self.schema(levels)
        least = self._draw(st.integers(0, 2))
        limits = {"minItems": least, "maxItems": least + self._draw(st.integers(0, 1))}
        counts = {key: self._count(value) for key, value in limits.items()}
        return self._typed("array", {"items": sent, **counts}, {"items": meaning, **limits})

    def _any(self, levels: int) -> Pair:
        pairs = [self.schema(levels) for _ in range(self._draw(st.integers(1, 2)))]
        return {self._key("anyOf"): [sent for sent, _ in pairs]}, {"anyOf": [meaning for _, meaning in pairs]}

    def _tuple(self, levels: int) -> Pair:
        pairs = [self.schema(levels) for _ in range(2)]
        rest = {"items": False, "minItems": self._draw(st.integers(0, 2))}
        sent = {"prefixItems": [sent for sent, _ in pairs], **rest}
        return self._typed("array", sent, {"prefixItems": [meaning for _, meaning in pairs], **rest})

    def _map(self, levels: int) -> Pair:
        sent, meaning = self.schema(levels)
        rest = {"additionalProperties": False, "maxProperties": 2}
        keyed = [{"patternProperties": {"^[a-z]$": schema}, **rest} for schema in (sent, meaning)]
        return self._typed("object", keyed[0], keyed[1])


def _same(schema: dict[str, Any]) -> Pair:
    return dict(schema), dict(schema)

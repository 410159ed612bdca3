"""The grammar of arguments that are nearly JSON, in two notations.

Bare keys, and texts between quotes that are tokens of their own: ``{city:<|"|>Paris<|"|>,days:3}``. Or keyword
arguments and values as Python writes them: ``city='Paris', days=3, tags=['x', None]``. llguidance knows only proper
JSON, so schemas become rules here; for numbers its own are used. What has no rule (patterns, keywords that combine
schemas) allows more, never less.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Schema = Mapping[str, Any]

ANY = "any_value"
MAX_LENGTH = 10_000
"""Length bounds of strings above this are not enforced."""

_BARE = re.compile(r"\w+")
_NUMERIC = ("integer", "number")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_PYTHON_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"})


@dataclass(frozen=True, slots=True)
class BareKeyNotation:
    """``quote`` is the quote as a term of a rule."""

    quote: str
    comma: str = ","
    colon: str = ":"
    constants: Mapping[Any, str] = field(default_factory=lambda: {True: "true", False: "false", None: "null"})

    def text(self, length: str) -> str:
        """The term of a text; ``length`` is its bounds in a regular expression. It has none of the two characters that
        transformers' parser keeps for itself."""
        return rf"{self.quote} /[^\x01\x02]{length}/ {self.quote}"

    def exactly(self, text: str) -> str:
        return f"{self.quote} {_quoted(text)} {self.quote}" if text else f"{self.quote} {self.quote}"

    def key(self, name: str) -> str:
        return _quoted(name) if _BARE.fullmatch(name) else self.exactly(name)

    @property
    def any_key(self) -> str:
        return f"/[A-Za-z_][A-Za-z0-9_]*/ | {self.text('*')}"


@dataclass(frozen=True, slots=True)
class PythonNotation:
    """Texts in either quote, on one line: each escape stands for one character."""

    comma: str = ", "
    colon: str = ": "
    constants: Mapping[Any, str] = field(default_factory=lambda: {True: "True", False: "False", None: "None"})

    def text(self, length: str) -> str:
        """As in `BareKeyNotation`."""
        inner = r"([^{quote}\\\x00-\x1f]|\\[\\'\"nrt])"
        kinds = (f"{quote}{inner.replace('{quote}', quote)}{length}{quote}" for quote in "'\"")
        return f"/{'|'.join(kinds)}/"

    def exactly(self, text: str) -> str:
        escaped = text.translate(_PYTHON_ESCAPES)
        kinds = [quote + escaped.replace(quote, f"\\{quote}") + quote for quote in "'\""]
        return f"({' | '.join(map(_quoted, kinds))})"

    def key(self, name: str) -> str:
        return self.exactly(name)

    @property
    def any_key(self) -> str:
        return self.text("*")


Notation = BareKeyNotation | PythonNotation


class ValueRules:
    """Collects rules in Lark; ``prefix`` keeps names of rules apart.

    Schemas are those of `llguidance.repaired`: they compile, and refer to nothing but their own ``$defs``.
    """

    def __init__(self, notation: Notation, prefix: str) -> None:
        self.rules: list[str] = []
        self._notation = notation
        self._comma, self._colon = _quoted(notation.comma), _quoted(notation.colon)
        self._prefix = prefix
        self._definitions: Schema = {}
        self._referred: dict[str, str] = {}

    def of(self, schema: Schema) -> str:
        """The name of a rule for the values that match a schema; its rules, and those it needs, are added."""
        self._definitions = schema.get("$defs", {})
        return self._rule(self._value(schema))

    def keywords_of(self, schema: Schema) -> str:
        """The name of a rule for keyword arguments without their parentheses, as `of`. A schema that is no plain object
        allows any."""
        self._definitions = schema.get("$defs", {})
        target = schema.get("$ref", "").rpartition("/")[2]
        return self._rule(self._members(self._definitions.get(target, schema), keywords=True))

    def _rule(self, body: str) -> str:
        name = f"{self._prefix}_{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def _value(self, schema: Any) -> str:
        """The right side of a rule."""
        if not isinstance(schema, Mapping):
            return ANY
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            if name not in self._definitions:
                return ANY
            if name not in self._referred:
                # The name is set before the rule is made: a definition may refer to itself.
                self._referred[name] = rule = f"{self._prefix}_def_{len(self._referred)}"
                body = self._value(self._definitions[name])
                self.rules.append(f"{rule}: {body}")
            return self._referred[name]
        if "const" in schema or "enum" in schema:
            return self._one_of(self._literal(value) for value in schema.get("enum", [schema.get("const")]))
        for several in ("anyOf", "oneOf", "allOf"):
            choices = schema.get(several, ())
            if choices and several != "allOf":
                return self._one_of(self._rule(self._value(choice)) for choice in choices)
            if len(choices) == 1:
                return self._value(choices[0])
        kinds = schema.get("type", "object" if "properties" in schema else None)
        if isinstance(kinds, list):
            return self._one_of(self._typed(kind, schema) for kind in kinds)
        return self._typed(kinds, schema)

    def _typed(self, kind: Any, schema: Schema) -> str:
        if kind in _NUMERIC:
            bounds = {name: schema[name] for name in _BOUNDS if name in schema}
            return self._rule(f"%json {json.dumps({'type': kind, **bounds})}")
        if kind == "boolean":
            return self._one_of(_quoted(self._notation.constants[truth]) for truth in (True, False))
        if kind == "null":
            return _quoted(self._notation.constants[None])
        if kind == "string":
            least, most = min(schema.get("minLength", 0), MAX_LENGTH), schema.get("maxLength")
            length = f"{least},{'' if most is None or most > MAX_LENGTH else most}"
            return self._rule(self._notation.text("*" if length == "0," else f"{{{length}}}"))
        if kind == "array":
            item = self._rule(self._value(schema.get("items")))
            least, most = schema.get("minItems", 0), schema.get("maxItems")
            if most == 0:
                return self._rule('"[]"')
            times = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
            filled = f"{item} {f'({self._comma} {item}){times}' if most != 1 else ''}"
            return self._rule(f'"[" {filled} "]"' if least else f'"[" ({filled})? "]"')
        if kind == "object":
            return self._rule(f'"{{" {self._rule(self._members(schema))} "}}"')
        return ANY

    def _members(self, schema: Schema, keywords: bool = False) -> str:
        """Members in the order of their declaration. There are two rules for what follows each place: one if nothing
        was written yet, one if a comma has to come first."""
        required = schema.get("required", ())
        rest = schema.get("additionalProperties", "properties" not in schema)
        colon, key = ('"="', _quoted) if keywords else (self._colon, self._notation.key)
        first, later = "", ""
        if rest is not False:
            other = self._rule(f"{'any_keyword' if keywords else 'any_key'} {colon} {self._rule(self._value(rest))}")
            first, later = f"({other} ({self._comma} {other})*)?", f"({self._comma} {other})*"
        for name, kind in reversed(schema.get("properties", {}).items()):
            member = self._rule(f"{key(name)} {colon} {self._rule(self._value(kind))}")
            then, or_else = self._rule(later or '""'), self._rule(first or '""')
            if name in required:
                first, later = f"{member} {then}", f"{self._comma} {member} {then}"
            else:
                first, later = f"{member} {then} | {or_else}", f"({self._comma} {member})? {then}"
        return first or '""'

    def _literal(self, value: Any) -> str:
        """A value of an enum, as it is written."""
        if isinstance(value, str):
            return self._notation.exactly(value)
        if isinstance(value, Mapping):
            pairs = (f"{self._notation.key(key)} {self._colon} {self._literal(inner)}" for key, inner in value.items())
            return f'"{{" {f" {self._comma} ".join(pairs)} "}}"'
        if isinstance(value, list):
            return f'"[" {f" {self._comma} ".join(map(self._literal, value))} "]"'
        is_constant = value is None or isinstance(value, bool)
        return _quoted(self._notation.constants[value] if is_constant else json.dumps(value))

    def _one_of(self, terms: Iterable[str]) -> str:
        return " | ".join(dict.fromkeys(terms)) or ANY


def any_value_rules(notation: Notation) -> list[str]:
    """The rules of values that no schema describes."""
    comma, colon = _quoted(notation.comma), _quoted(notation.colon)
    return [
        f'{ANY}: any_text | any_constant | any_number | any_object | "[" ({ANY} ({comma} {ANY})*)? "]"',
        f'any_object: "{{" (any_member ({comma} any_member)*)? "}}"',
        f"any_member: any_key {colon} {ANY}",
        f"any_key: {notation.any_key}",
        "any_keyword: /[A-Za-z_][A-Za-z0-9_]*/",
        f"any_text: {notation.text('*')}",
        f"any_constant: {' | '.join(map(_quoted, notation.constants.values()))}",
        'any_number: %json {"type": "number"}',
    ]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

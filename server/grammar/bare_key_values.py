"""The grammar of arguments that are nearly JSON: bare keys, and texts between quotes that are tokens of their own.

For example ``{city:<|"|>Paris<|"|>,days:3,tags:[<|"|>x<|"|>]}``. llguidance knows only proper JSON, so schemas become
rules here; for numbers its own are used. What has no rule (patterns, keywords that combine schemas) allows more, never
less.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]

ANY = "any_value"
MAX_LENGTH = 10_000
"""Length bounds of strings above this are not enforced."""

_BARE = re.compile(r"\w+")
_TEXT = r"/[^\x01\x02]*/"
"""Without the two characters that transformers' parser keeps for itself."""
_NUMERIC = ("integer", "number", "boolean", "null")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


class ValueRules:
    """Collects rules in Lark; ``quote`` is the quote as a term of a rule, ``prefix`` keeps names of rules apart.

    Schemas are those of `llguidance.repaired`: they compile, and refer to nothing but their own ``$defs``.
    """

    def __init__(self, quote: str, prefix: str) -> None:
        self.rules: list[str] = []
        self._quote = quote
        self._prefix = prefix
        self._definitions: Schema = {}
        self._referred: dict[str, str] = {}

    def of(self, schema: Schema) -> str:
        """The name of a rule for the values that match a schema; its rules, and those it needs, are added."""
        self._definitions = schema.get("$defs", {})
        return self._rule(self._value(schema))

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
        if kind == "string":
            least, most = min(schema.get("minLength", 0), MAX_LENGTH), schema.get("maxLength")
            length = f"{least},{'' if most is None or most > MAX_LENGTH else most}"
            text = _TEXT if length == "0," else rf"/[^\x01\x02]{{{length}}}/"
            return self._rule(f"{self._quote} {text} {self._quote}")
        if kind == "array":
            item = self._rule(self._value(schema.get("items")))
            least, most = schema.get("minItems", 0), schema.get("maxItems")
            if most == 0:
                return self._rule('"[]"')
            more = f'("," {item}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}' if most != 1 else ""
            filled = f"{item} {more}"
            return self._rule(f'"[" {filled} "]"' if least else f'"[" ({filled})? "]"')
        if kind == "object":
            return self._rule(self._object(schema))
        return ANY

    def _object(self, schema: Schema) -> str:
        """Members in the order of their declaration. There are two rules for what follows each place: one if nothing
        was written yet, one if a comma has to come first."""
        required = schema.get("required", ())
        rest = schema.get("additionalProperties", "properties" not in schema)
        first, later = "", ""
        if rest is not False:
            other = self._rule(f'any_key ":" {self._rule(self._value(rest))}')
            first, later = f'({other} ("," {other})*)?', f'("," {other})*'
        for name, kind in reversed(schema.get("properties", {}).items()):
            member = self._rule(f'{self._key(name)} ":" {self._rule(self._value(kind))}')
            then, or_else = self._rule(later or '""'), self._rule(first or '""')
            if name in required:
                first, later = f"{member} {then}", f'"," {member} {then}'
            else:
                first, later = f"{member} {then} | {or_else}", f'("," {member})? {then}'
        return f'"{{" {self._rule(first or chr(34) * 2)} "}}"'

    def _key(self, name: str) -> str:
        return _quoted(name) if _BARE.fullmatch(name) else f"{self._quote} {_quoted(name)} {self._quote}"

    def _literal(self, value: Any) -> str:
        """A value of an enum, as it is written."""
        if isinstance(value, str):
            return f"{self._quote} {_quoted(value)} {self._quote}" if value else f"{self._quote} {self._quote}"
        if isinstance(value, Mapping):
            members = ' "," '.join(f'{self._key(key)} ":" {self._literal(inner)}' for key, inner in value.items())
            return f'"{{" {members} "}}"'
        if isinstance(value, list):
            items = ' "," '.join(map(self._literal, value))
            return f'"[" {items} "]"'
        return _quoted(json.dumps(value))

    def _one_of(self, terms: Iterator[str]) -> str:
        return " | ".join(dict.fromkeys(terms)) or ANY


def any_value_rules(quote: str) -> list[str]:
    """The rules of values that no schema describes."""
    return [
        f'{ANY}: any_text | any_scalar | any_object | "[" ({ANY} ("," {ANY})*)? "]"',
        'any_object: "{" (any_member ("," any_member)*)? "}"',
        f'any_member: any_key ":" {ANY}',
        f"any_key: /[A-Za-z_][A-Za-z0-9_]*/ | {quote} {_TEXT} {quote}",
        f"any_text: {quote} {_TEXT} {quote}",
        'any_scalar: %json {"type": ["number", "boolean", "null"]}',
    ]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

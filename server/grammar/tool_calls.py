"""The grammar of an answer that may call functions, in the syntax of the model's family.

A model that must call can do nothing else. One that may call writes what it likes until a call begins: from there on
only a declared function with arguments that fit its schema can follow. Calls end an answer.

Tokens that llguidance takes for special ones are written by their number: no text matches them. A marker that is plain
text is looked for by a lazy lexeme: the first occurrence begins a call.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from server.convert.tools import Function, Tools
from server.errors import InvalidArgument
from server.families.family import CallSyntax, Family
from server.grammar.bare_key_values import ValueRules, any_value_rules
from server.grammar.llguidance import JSON_STYLE, accepted, repaired

MAX_CALLS = 8
"""In one answer: a model that repeats itself must come to an end."""
MAX_UNLEARNED_CALLS = 4
"""In one answer of a model that never learned to call, and that repeats itself often."""
REPAIR_SECONDS = 1.0
"""For the schemas of all functions together; those whose turn does not come leave their arguments free."""

Schema = Mapping[str, Any]

_ANY_OBJECT: Schema = {"type": "object"}
_TEXT = r"/(.|\n)*/"
_PARAMETER_END = "\n</parameter>\n"


def tool_grammar(tools: Tools, family: Family, atom_ids: Mapping[str, int]) -> str:
    """The grammar for ``SamplingParams.grammar``. Schemas of arguments constrain as far as they can; those that cannot
    be compiled together leave the arguments free. Takes as long as `grammars.py` says.
    """
    until = time.monotonic() + REPAIR_SECONDS
    try:
        schemas = [_schema(function, until) for function in tools.allowed]
        return accepted(written(tools, schemas, family, atom_ids), "tools")
    except InvalidArgument:
        free = [_ANY_OBJECT] * len(tools.allowed)
        return accepted(written(tools, free, family, atom_ids), "tools")


def free_arguments(tools: Tools) -> Tools:
    """The same functions with any object as the arguments of each."""
    allowed = tuple(replace(function, parameters=_ANY_OBJECT) for function in tools.allowed)
    return replace(tools, allowed=allowed)


def written(tools: Tools, schemas: Sequence[Schema | None], family: Family, atom_ids: Mapping[str, int]) -> str:
    """The grammar, in Lark; ``schemas`` are those of the arguments of the allowed functions, None for no arguments."""
    lark = "\n".join(_Grammar(family, atom_ids).rules(tools, schemas))
    return json.dumps({"grammars": [{"lark_grammar": lark}]}, ensure_ascii=False)


def led(grammar: str, family: Family, atom_ids: Mapping[str, int]) -> str:
    """The grammar of an answer behind what the family's models write before it, such as the header of a channel."""
    if not family.lead:
        return grammar
    (answer,) = json.loads(grammar)["grammars"]
    start = f"start: {_Grammar(family, atom_ids).literal(family.lead)} @answer"
    return json.dumps({"grammars": [{"lark_grammar": start}, {"name": "answer", **answer}]}, ensure_ascii=False)


def _schema(function: Function, until: float) -> Schema | None:
    parameters = function.parameters
    if not parameters or (parameters.get("properties") == {} and not parameters.get("additionalProperties")):
        return None
    return repaired(parameters, until)


class _Grammar:
    def __init__(self, family: Family, atom_ids: Mapping[str, int]) -> None:
        self._family = family
        self._ids = atom_ids
        self._extra: list[str] = []
        longest_first = sorted(atom_ids, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if atom_ids else "(?!)")

    def rules(self, tools: Tools, schemas: Sequence[Schema | None]) -> list[str]:
        syntax = self._family.call
        start = self._must_call(syntax) if tools.must_call else self._may_call(syntax)
        head = (syntax.opening + syntax.before).removeprefix(syntax.begin)
        most = MAX_CALLS if syntax.repeats else MAX_UNLEARNED_CALLS
        more = f"({self.literal(syntax.separator + syntax.before)} call){{0,{most - 1}}}"
        names = [f"call_{index}" for index in range(len(schemas))]
        return [
            "%llguidance {}",
            *start,
            f"calls: {self.literal(head)} call {more if syntax.parallel else ''} {self.literal(syntax.closing)}",
            f"call: {' | '.join(names)}",
            *(
                f"{rule}: {self.literal(function.name + syntax.between)} {self._arguments(schema)} "
                f"{self.literal(syntax.after)}"
                for rule, function, schema in zip(names, tools.allowed, schemas, strict=True)
            ),
            f"value[suffix={_quoted(_PARAMETER_END)}]: {_TEXT}",
            *self._extra,
        ]

    def _must_call(self, syntax: CallSyntax) -> list[str]:
        return [f"start: {self.literal(syntax.begin)} calls"]

    def _may_call(self, syntax: CallSyntax) -> list[str]:
        if self._family.lead:
            return [
                f"start: {self.literal(self._family.lead)} TEXT | {self.literal(syntax.begin)} calls",
                _rule_text(),
            ]
        if not syntax.begin:  # an answer that begins like a call is one
            return [r"start: TEXT | calls", r"TEXT: /(\s*[^{\s](.|\n)*)?/"]
        if self._special.match(syntax.begin):
            return [f"start: TEXT ({self.literal(syntax.begin)} calls)?", _rule_text()]
        return ["start: TEXT | begun calls", f"begun[lazy]: TEXT {_quoted(syntax.begin)}", _rule_text()]

    def _arguments(self, schema: Schema | None) -> str:
        match self._family.call.arguments:
            case "quoted":
                return self._quoted_values(schema) if schema else '"{}"'
            case "xml":
                return self._parameters(schema) if schema else ""
            case _:
                return _json(schema) if schema else '"{}"'

    def _quoted_values(self, schema: Schema) -> str:
        quote = self.literal(self._family.call.quote)
        values = ValueRules(quote, f"args_{len(self._extra)}")
        name = values.of(schema)
        self._extra += values.rules if self._extra else [*any_value_rules(quote), *values.rules]
        return name

    def _parameters(self, schema: Schema) -> str:
        """Parameters in the order of their declaration; those that are not required may be left out."""
        definitions = {"$defs": schema["$defs"]} if "$defs" in schema else {}
        required = schema.get("required", ())
        parts = []
        for name, kind in schema.get("properties", {}).items():
            tag = self.literal(f"<parameter={name}>\n")
            part = f"({tag} {self._value(kind, definitions)})"
            parts.append(part if name in required else f"{part}?")
        return " ".join(parts)

    def _value(self, kind: Any, definitions: Schema) -> str:
        schema = kind if isinstance(kind, dict) else {}
        choices = schema.get("enum", ())
        if choices and all(isinstance(choice, str) for choice in choices):
            return f"({' | '.join(map(_quoted, choices))}) {_quoted(_PARAMETER_END)}"
        if _may_be_text(schema):
            return "value"
        return f"{_json({**schema, **definitions})} {_quoted(_PARAMETER_END)}"

    def literal(self, text: str) -> str:
        """A text of ours, with its special tokens by number."""
        pieces = filter(None, self._special.split(text))
        return " ".join(f"<[{self._ids[piece]}]>" if piece in self._ids else _quoted(piece) for piece in pieces)


def _may_be_text(schema: Schema) -> bool:
    kinds = schema.get("type")
    if kinds is None:
        choices = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
        plain = not schema.keys() & {"enum", "const", "$ref", "allOf", "anyOf", "oneOf"}
        return plain or any(_may_be_text(choice) for choice in choices if isinstance(choice, dict))
    return "string" in ([kinds] if isinstance(kinds, str) else kinds)


def _rule_text() -> str:
    return f"TEXT: {_TEXT}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json(schema: Schema) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_STYLE}, ensure_ascii=False)}"

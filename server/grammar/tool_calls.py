"""The grammar of an answer that may call functions, in the syntax of the model's family.

A model that must call can do nothing else. One that may call writes freely until a call begins: from there on
only a declared function with arguments that fit its schema can follow. Calls end an answer.

Tokens that llguidance takes for special ones are written by their number: no text matches them. A marker that is plain
text is found by a lazy lexeme: the first occurrence begins a call.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from server.convert.tools import Tools
from server.errors import InvalidArgument
from server.families.family import Arguments, BareKeyArguments, Family, PythonArguments, TaggedArguments
from server.grammar.llguidance import JSON_STYLE, Unenforced, accepted, begins, repaired
from server.grammar.schema_closure import placed
from server.grammar.schema_dialects import JSON_PARAMETERS, PARAMETERS
from server.grammar.schema_reader import step
from server.grammar.value_rules import BareKeyNotation, Notation, PythonNotation, ValueRules, any_value_rules

MAX_CALLS = 8
"""In one answer: a model that repeats itself must come to an end."""
MAX_UNLEARNED_CALLS = 4
"""In one answer of a model that never learned to call, and that repeats itself often. It calls once where it must call
the one function that it may: programs that ask for data in this way want it once."""
REPAIR_SECONDS = 1.0
"""For the schemas of all functions together; those not reached in time leave their arguments free."""

Schema = dict[str, Any]

_OF_TEXTS = ("minLength", "maxLength", "pattern", "format")
_NOT_IN_TAGS = ("allOf", "anyOf", "oneOf", "$ref", "patternProperties", "maxProperties", "enum", "const")
_NOT_IN_RULES = ("pattern", "format", "allOf", "patternProperties", "maxProperties", "prefixItems")
_ANY_OBJECT: Schema = {"type": "object"}
_TEXT = r"/(.|\n)*/"


def checked_tool_call_grammar(
    tools: Tools, family: Family, atom_ids: Mapping[str, int], answer: str = ""
) -> tuple[str, list[Unenforced], tuple[str, ...]]:
    """The grammar for ``SamplingParams.grammar``; what it does not enforce of the parameters of each function that is
    allowed; and the texts by which a call is told from an answer that follows ``answer``, the grammar of a schema.

    Schemas of arguments constrain as far as they can; those that cannot be compiled together leave the arguments free.
    Raises ``InvalidArgument`` where calls and answers cannot be told apart. Takes as long as `llguidance.py` says.
    """
    until = time.process_time() + REPAIR_SECONDS
    schemas: list[Schema | None] = []
    unenforced: list[Unenforced] = []
    starts = call_starts(tools, family, atom_ids, answer)
    for function in tools.allowed:
        parameters = function.parameters
        takes_none = not parameters or (
            parameters.get("properties") == {} and not parameters.get("additionalProperties")
        )
        dialect = JSON_PARAMETERS if function.is_json_schema else PARAMETERS
        schema, left = (None, {}) if takes_none else repaired(parameters, dialect, until)
        schemas.append(schema)
        unenforced.append(left | dict.fromkeys(_lost(family.call.arguments, schema), True) if schema else left)
    try:
        grammar = accepted(tool_call_grammar(tools, schemas, family, atom_ids, answer, starts), "tools")
    except InvalidArgument:
        free = [_ANY_OBJECT] * len(tools.allowed)
        grammar = accepted(tool_call_grammar(tools, free, family, atom_ids, answer, starts), "tools")
        unenforced = [{"": True} if function.parameters else {} for function in tools.allowed]
    return grammar, unenforced, starts


def free_arguments(tools: Tools) -> Tools:
    """The same functions with any object as the arguments of each."""
    allowed = tuple(replace(function, parameters=_ANY_OBJECT) for function in tools.allowed)
    return replace(tools, allowed=allowed)


def call_starts(tools: Tools, family: Family, atom_ids: Mapping[str, int], answer: str) -> tuple[str, ...]:
    """The texts of which a call begins with one, where an answer that follows ``answer`` begins with none; empty where
    the family's own trigger tells calls apart. Raises ``InvalidArgument`` where nothing does.

    Calls of some families are JSON without a marker: where an answer may begin as a call of one of the functions does,
    calls begin with the token that these models know for it.
    """
    call = family.call
    if not answer or any(call.trigger.startswith(token) for token in atom_ids):  # no text matches a special token
        return ()
    starts = (
        (call.trigger,)
        if call.trigger
        else tuple(f"{call.call_start}{function.name}{call.separator(function.name)}" for function in tools.allowed)
    )
    if not any(begins(answer, start) for start in starts):
        return () if call.trigger else starts
    if not call.trigger and call.call_token in atom_ids:
        return (call.call_token,)
    raise InvalidArgument.at(
        "generation_config",
        "* GenerateContentRequest.generation_config: an answer that follows the schema could begin with "
        f"{starts[0]!r}, as a call does. Send a schema that tells them apart, or no functions.",
    )


def tool_call_grammar(
    tools: Tools,
    schemas: Sequence[Schema | None],
    family: Family,
    atom_ids: Mapping[str, int],
    answer: str = "",
    starts: Sequence[str] = (),
) -> str:
    """The grammar, in Lark; ``schemas`` are those of the arguments of the allowed functions, None for no arguments.
    ``answer`` and ``starts`` as in `checked_tool_call_grammar`."""
    lark = "\n".join(_Grammar(family, atom_ids).rules(tools, schemas, bool(answer), starts))
    named = [{"name": "answer", **part} for part in json.loads(answer)["grammars"]] if answer else []
    return json.dumps({"grammars": [{"lark_grammar": lark}, *named]}, ensure_ascii=False)


def with_answer_header(grammar: str, family: Family, atom_ids: Mapping[str, int]) -> str:
    """The grammar of an answer after what the family's models write before it, such as the header of a channel."""
    if not family.answer_header:
        return grammar
    (answer,) = json.loads(grammar)["grammars"]
    start = f"start: {_Grammar(family, atom_ids).literal(family.answer_header)} @answer"
    return json.dumps({"grammars": [{"lark_grammar": start}, {"name": "answer", **answer}]}, ensure_ascii=False)


class _Grammar:
    """Writes rules in Lark; ``atom_ids`` are the tokens that are written by their number."""

    def __init__(self, family: Family, atom_ids: Mapping[str, int]) -> None:
        self._family = family
        self._ids = atom_ids
        self._argument_rules: list[str] = []
        longest_first = sorted(atom_ids, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if atom_ids else "(?!)")

    def rules(
        self, tools: Tools, schemas: Sequence[Schema | None], has_answer: bool, starts: Sequence[str]
    ) -> list[str]:
        syntax = self._family.call
        names = [f"call_{index}" for index in range(len(schemas))]
        most = MAX_CALLS
        if not syntax.keeps_duplicates:
            most = 1 if tools.must_call and len(names) == 1 else MAX_UNLEARNED_CALLS
        # Beside an answer in JSON a call without a marker is JSON too, read piece by piece: what both may begin with is
        # not taken for one of them before they differ.
        as_json = bool(starts) and not syntax.trigger and starts[0] != syntax.call_token
        call_start = "" if as_json else syntax.call_start
        more = f"({self.literal(syntax.call_separator + call_start)} call){{0,{most - 1}}}"
        behind_trigger = (syntax.section_start + call_start).removeprefix(syntax.trigger)
        calls = f"call {more if syntax.is_parallel and most > 1 else ''} {self.literal(syntax.section_end)}"
        lines = [
            "%llguidance {}",
            *self._start(tools.must_call, has_answer, starts),
            f"calls: {self.literal(behind_trigger)} {calls}",
            f"call: {' | '.join(names)}",
        ]
        for rule, function, schema in zip(names, tools.allowed, schemas, strict=True):
            if as_json:
                lines.append(f"{rule}: {_json(_call_schema(syntax.write((function.name, '{}')), schema))}")
                continue
            lines.append(
                f"{rule}: {self._head(function.name)} {self._arguments(schema)} {self.literal(syntax.call_end)}"
            )
        if syntax.number_mark:
            lines.append("NUMBER: /[0-9]{1,4}/")
        if isinstance(syntax.arguments, TaggedArguments):
            end = syntax.arguments.end
            is_token = self._special.match(end)  # which no text matches
            lines.append(
                f"value: {_TEXT} {self.literal(end)}" if is_token else f"value[suffix={_quoted(end)}]: {_TEXT}"
            )
        return [*lines, *self._argument_rules]

    def _head(self, name: str) -> str:
        """A call up to its arguments."""
        syntax = self._family.call
        if not syntax.number_mark:
            return self.literal(name + syntax.separator(name))
        return f"{self.literal(name + syntax.number_mark)} NUMBER {self.literal(syntax.separator(name))}"

    def _start(self, must_call: bool, has_answer: bool, starts: Sequence[str]) -> list[str]:
        """How an answer begins, up to the trigger of its calls."""
        trigger, header = self._family.call.trigger, self._family.answer_header
        text_rule = f"TEXT: {_TEXT}"
        if has_answer:
            token = self._family.call.call_token
            return [f"start: {self._headed('@answer', token if token in starts else trigger)}"]
        if must_call:
            return [f"start: {self.literal(trigger)} calls"]
        if header:
            return [f"start: {self._headed('TEXT', trigger)}", text_rule]
        if not trigger:  # an answer that begins like a call is one
            return [r"start: TEXT | calls", r"TEXT: /(\s*[^{\s](.|\n)*)?/"]
        if self._special.match(trigger):
            return [f"start: TEXT ({self.literal(trigger)} calls)?", text_rule]
        return ["start: TEXT | begun calls", f"begun[lazy]: TEXT {_quoted(trigger)}", text_rule]

    def _headed(self, answer: str, begun: str) -> str:
        """``answer`` behind its header, or calls behind what begins them. What both begin with is written once: a name
        that goes on as the header does would be taken for it."""
        header = self._family.answer_header
        if not begun or not header.startswith(begun):
            return f"{self.literal(header)} {answer} | {self.literal(begun)} calls"
        return f"{self.literal(begun)} ({self.literal(header.removeprefix(begun))} {answer} | calls)"

    def _arguments(self, schema: Schema | None) -> str:
        match self._family.call.arguments:
            case TaggedArguments() as tags:
                return self._tagged_arguments(tags, schema) if schema else ""
            case PythonArguments():
                return self._notated(PythonNotation(), schema) if schema else ""
            case BareKeyArguments(quote) if schema:
                return self._notated(BareKeyNotation(self.literal(quote)), schema)
            case _:
                return _json(schema) if schema else '"{}"'

    def _notated(self, notation: Notation, schema: Schema) -> str:
        """The name of a rule for arguments that are nearly JSON."""
        values = ValueRules(notation, f"args_{len(self._argument_rules)}")
        name = values.keywords_of(schema) if isinstance(notation, PythonNotation) else values.of(schema)
        shared = [] if self._argument_rules else any_value_rules(notation)
        self._argument_rules += [*shared, *values.rules]
        return name

    def _tagged_arguments(self, tags: TaggedArguments, schema: Schema) -> str:
        """Arguments in the order of their declaration; those that are not required may be left out."""
        definitions = {"$defs": schema["$defs"]} if "$defs" in schema else {}
        end = self.literal(tags.end)
        parts = []
        for name, declared in schema.get("properties", {}).items():
            value = declared if isinstance(declared, dict) else {}
            choices = value.get("enum", ())
            if choices and all(isinstance(choice, str) for choice in choices):
                term = f"({' | '.join(map(_quoted, choices))}) {end}"
            elif _may_be_text(value):
                term = "value"
            else:
                term = f"{_json({**value, **definitions})} {end}"
            part = f"({self.literal(tags.start.format(name=name))} {term})"
            parts.append(part if name in schema.get("required", ()) else f"{part}?")
        return " ".join(parts)

    def literal(self, text: str) -> str:
        """A fixed text, with its special tokens by number."""
        pieces = filter(None, self._special.split(text))
        return " ".join(f"<[{self._ids[piece]}]>" if piece in self._ids else _quoted(piece) for piece in pieces)


def _lost(arguments: Arguments, schema: Schema) -> Iterator[str]:
    """The paths of what the rules of the arguments do not enforce although the schema compiles."""
    if isinstance(arguments, BareKeyArguments | PythonArguments):
        for place, inner in placed(schema):
            yield from (f"{place}.{keyword}" for keyword in _NOT_IN_RULES if keyword in inner)
    elif isinstance(arguments, TaggedArguments):
        for name, inner in schema.get("properties", {}).items():
            texts = _OF_TEXTS if isinstance(inner, dict) and _may_be_text(inner) else ()
            yield from (f".properties{step(name)}.{keyword}" for keyword in texts if keyword in inner)
        yield from (f".{keyword}" for keyword in _NOT_IN_TAGS if keyword in schema)


def _call_schema(call: str, arguments: Schema | None) -> Schema:
    """The schema of a call that is a JSON object: ``call`` is one with no arguments."""
    inner = dict(arguments) if arguments is not None else {"type": "object", "additionalProperties": False}
    definitions = inner.pop("$defs", {})
    members = {key: {"const": value} if value else inner for key, value in json.loads(call).items()}
    return {
        "type": "object",
        "properties": members,
        "required": list(members),
        "additionalProperties": False,
        **({"$defs": definitions} if definitions else {}),
    }


def _may_be_text(schema: Schema) -> bool:
    kinds = schema.get("type")
    if kinds is None:
        choices = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
        plain = not schema.keys() & {"enum", "const", "$ref", "allOf", "anyOf", "oneOf"}
        return plain or any(_may_be_text(choice) for choice in choices if isinstance(choice, dict))
    return "string" in ([kinds] if isinstance(kinds, str) else kinds)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json(schema: Schema) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_STYLE}, ensure_ascii=False)}"

"""The text of an answer as parts: what the model says, what it thinks, and the functions that it calls.

transformers' streaming parser splits the text by the family's markers. It is only asked to split: what a call holds is
read here when the call is complete, so that a call that cannot be read ends a candidate and nothing more.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from engine.api.events import FinishReason
from server.families.family import Family
from server.families.transformers_import import library

MAX_DEPTH = 64
"""Of a call's arguments: whoever gets them has to write and read them as JSON."""

_THOUGHT_FIELDS = frozenset({"reasoning_content", "reasoning", "thinking"})
_CAST = {"start_anchor_pattern": r"\A", "fields": {"tool_calls": {"content": "json"}}}
"""Reads calls that are JSON already: the way to the library's casting of arguments by their schemas."""

_MARKUP = "<>[]{};"
_DISGUISE = {ord(char): 0xF0000 + ord(char) for char in _MARKUP}
_REVEAL = {shifted: char for char, shifted in _DISGUISE.items()}
_UNREADABLE = "The model wrote a function call that cannot be read."
_LAST = "\0"
_BLOCKS = re.compile(rf'[^"\\\n{re.escape(_MARKUP)}]+|.', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Text:
    """Some of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Some of the thoughts."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A complete call of a declared function."""

    id: str
    name: str
    args: dict[str, Any]


Piece = Text | Thought | Call


class Unreadable(ValueError):
    """A call is complete and cannot be made; the message is a sentence for the client."""


class AnswerSyntax:
    """How the answers to one request are to be read.

    ``tools`` are the declared functions as chat templates get them; where there are none, nothing is a call.
    ``opened`` tells that the prompt ends within thoughts. ``constrained`` tells that a grammar rules what comes after
    the thoughts: from there on a marker is just text.
    """

    def __init__(
        self,
        family: Family,
        tools: Sequence[Mapping[str, Any]] = (),
        opened: bool = False,
        constrained: bool = False,
    ) -> None:
        self.constrained = constrained and not tools
        self.tools = [dict(tool) for tool in tools]
        self.names = frozenset(tool["function"]["name"] for tool in tools)
        self.opening = family.thought[0] if opened and family.thought else ""
        self.call_begin = family.call.begin if tools else ""
        self.repeats = family.call.repeats
        self._template = family.response_template(calls=bool(tools))

    @cached_property
    def splitter(self) -> Any:
        """The family's response template, with every field as plain text."""
        fields = {name: _as_text(field) for name, field in self._template["fields"].items()}
        return library().chat_parsing.response_templates.load_response_template({**self._template, "fields": fields})

    @cached_property
    def call_field(self) -> Any:
        """The field of calls as the family's table has it; None where nothing is a call."""
        return library().chat_parsing.response_templates.load_response_template(self._template).fields.get("tool_calls")

    @property
    def quotes_json(self) -> bool:
        """Whether calls hold JSON with ordinary strings, in which a marker is just text."""
        field = self.call_field
        return field is not None and field.content == "json" and "string_delims" not in field.content_args

    @property
    def calls_in_tags(self) -> bool:
        """Whether calls are not JSON: then only the last marker tells that one is whole."""
        return self.call_field is not None and self.call_field.content != "json"

    def parser(self) -> PartsParser:
        """A parser for one candidate."""
        return PartsParser(self)

    def calls(self, region: Mapping[str, Any]) -> list[Call]:
        """What the text of a region says, as calls. Raises ``Unreadable``."""
        parsing = library().chat_parsing
        captures = {name: text.strip() for name, text in region.items() if name != "body"}
        try:
            found = parsing.content_parsers.process_field(region["body"].translate(_REVEAL), self.call_field, captures)
            found = [_function(call) for call in (found if isinstance(found, list) else [found])]
            written = json.dumps(found, allow_nan=False)
            cast = parsing.parse_response(written, _CAST, prefix="", tools=self.tools)["tool_calls"]
        except (ValueError, KeyError, RecursionError):
            raise Unreadable(_UNREADABLE) from None
        return [self._call(call["function"]) for call in cast]

    def _call(self, function: Mapping[str, Any]) -> Call:
        name, args = function["name"], function["arguments"]
        if name not in self.names:
            raise Unreadable(f"The model called {str(name)[:128]!r}, which is not among the declared functions.")
        if not isinstance(args, dict):
            raise Unreadable(f"The model called {name} with arguments that are not an object.")
        if _deeper(args, MAX_DEPTH):
            raise Unreadable(f"The model called {name} with arguments nested deeper than {MAX_DEPTH} levels.")
        return Call(f"call_{secrets.token_hex(8)}", name, args)


class PartsParser:
    """Reads one candidate: ``feed`` text as it comes, ``flush`` when it ended.

    Pieces are the same however the text was cut, once neighbours of a kind are joined. White space stays as the model
    wrote it, except beside thoughts and calls. ``problem`` tells why the candidate's call cannot be made; nothing
    comes after it.
    """

    def __init__(self, syntax: AnswerSyntax) -> None:
        self.problem = ""
        self._syntax = syntax
        self._splitter = library().chat_parsing.ResponseParser(syntax.splitter, prefix=syntax.opening)
        self._trim = _Trim(begun=bool(syntax.opening))
        self._string = _JsonString() if syntax.quotes_json else None
        self._in_call = False
        self._thinking = bool(syntax.opening)
        self._last: type[Piece] | None = None
        self._bordered = False
        self._made: set[str] = set()

    def feed(self, text: str) -> list[Piece]:
        """What ``text`` adds for certain."""
        pieces: list[Piece] = []
        for block in _BLOCKS.findall(text) if self._string or self._syntax.constrained else [text]:
            if self.problem:
                break
            pieces += self._read(block)
        return pieces

    def _read(self, block: str) -> Iterator[Piece]:
        if self._syntax.constrained and self._last is Text:
            return self._said(block)
        quoted = self._in_call and self._string is not None and self._string.open
        return self._pieces(self._splitter.feed(block.translate(_DISGUISE) if quoted else block))

    def flush(self, reason: FinishReason) -> list[Piece]:
        """The rest. A call without its last marker is taken if it is whole; no fragment of one is shown."""
        if self.problem:
            return []
        cut = reason is not FinishReason.STOP
        pieces = self._ended(cut)
        if cut:  # what a limit cut off is unfinished, not wrong
            self.problem = ""
        return pieces

    def _ended(self, cut: bool) -> list[Piece]:
        in_tags = self._syntax.calls_in_tags
        pieces = self._settled() if in_tags and (self._in_call or not cut) else []
        if in_tags and self._in_call:
            self.problem = "The model ended its answer in the middle of a function call."
            return pieces
        calling = self._in_call
        _, events = self._splitter.finalize()
        if cut and not calling and any(map(_begins_something, events)):
            return pieces
        pieces += self._pieces(events)
        return pieces if self.problem else [*pieces, *self._rest()]

    def _settled(self) -> list[Piece]:
        """What is certain once no marker can grow any more: a last character that is part of none makes it so."""
        pieces = []
        for piece in self.feed(_LAST):
            shown = piece if isinstance(piece, Call) else replace(piece, text=piece.text.replace(_LAST, ""))
            if isinstance(shown, Call) or shown.text:
                pieces.append(shown)
        return pieces

    def _rest(self) -> list[Piece]:
        space = self._trim.flush()
        return [Text(space)] if space and not self._thinking else []

    def _pieces(self, events: list[dict[str, Any]]) -> Iterator[Piece]:
        for event in events:
            if self.problem:
                return
            kind, field = event["type"], event["field"]
            if kind == "region_chunk":
                yield from self._grown(field, event["text"])
            elif kind == "region_close" and field == "tool_calls":
                yield from self._called(event["value"])
            elif kind == "region_open":
                self._opened(field)

    def _opened(self, field: str) -> None:
        self._in_call = field == "tool_calls"
        self._thinking = field in _THOUGHT_FIELDS
        self._bordered = True
        if self._in_call and self._string:
            self._string = _JsonString()
        self._trim.border(field)

    def _grown(self, field: str, text: str) -> Iterator[Piece]:
        if field == "tool_calls":
            if self._string:
                self._string.read(text)
        elif field in _THOUGHT_FIELDS:
            if shown := self._trim.feed(text):
                yield Thought(self._apart(Thought, shown))
        elif field == "content":
            yield from self._said(text)

    def _said(self, text: str) -> Iterator[Piece]:
        """Text that holds the marker of a call is a call whose syntax is wrong from the start."""
        begin = self._syntax.call_begin
        before, marker, _ = text.partition(begin) if begin else (text, "", "")
        if shown := self._trim.feed(before):
            yield Text(self._apart(Text, shown))
        if marker:
            self.problem = _UNREADABLE

    def _apart(self, kind: type[Piece], text: str) -> str:
        """Two regions of one kind with nothing but markers between them do not run together."""
        apart = self._bordered and self._last is kind
        self._bordered, self._last = False, kind
        return f"\n{text}" if apart else text

    def _called(self, region: Mapping[str, Any]) -> list[Call]:
        self._in_call = False
        self._last = Call
        try:
            found = self._syntax.calls(region)
        except Unreadable as problem:
            self.problem = str(problem)
            return []
        return [call for call in found if self._syntax.repeats or self._is_new(call)]

    def _is_new(self, call: Call) -> bool:
        """Whether the answer does not hold this very call yet; from now on it does."""
        before = len(self._made)
        self._made.add(json.dumps([call.name, call.args], sort_keys=True))
        return len(self._made) > before


class _Trim:
    """Drops white space at the borders of regions; what stands at the end is held back until it is known to be none.

    ``begun`` tells that a region was opened before the answer.
    """

    def __init__(self, begun: bool) -> None:
        self._begun = self._fresh = begun
        self._space: list[str] = []

    def border(self, field: str) -> None:
        """A region begins. Plain text that the answer begins with has no border before it."""
        self._fresh = self._begun or field != "content"
        self._begun = True
        self._space = []

    def feed(self, text: str) -> str:
        """What can be shown."""
        if self._fresh:
            text = text.lstrip()
            self._fresh = not text
        kept = text.rstrip()
        if not kept:
            self._space.append(text)
            return ""
        shown = "".join([*self._space, kept])
        self._space = [text[len(kept) :]]
        return shown

    def flush(self) -> str:
        """White space at the very end, which no border follows."""
        return "".join(self._space)


class _JsonString:
    """Follows JSON text; ``open`` while it is within a string."""

    def __init__(self) -> None:
        self.open = False
        self._escaped = False

    def read(self, text: str) -> None:
        """The next piece of the text."""
        for char in text:
            if self._escaped:
                self._escaped = False
            elif char == '"':
                self.open = not self.open
            else:
                self._escaped = self.open and char == "\\"


def answer_parser(
    family: Family, tools: Sequence[Mapping[str, Any]] = (), opened: bool = False, constrained: bool = False
) -> Callable[[], PartsParser] | None:
    """What makes a parser for each candidate; None where an answer can be nothing but text."""
    return AnswerSyntax(family, tools, opened, constrained).parser if tools or family.thought else None


def _as_text(field: Mapping[str, Any]) -> dict[str, Any]:
    """A field that delivers its text as it is, with what its opening captured."""
    kept = {key: value for key, value in field.items() if key in ("open", "open_pattern", "close", "close_pattern")}
    if "open_pattern" in kept:
        # White space beside a call is dropped here; the search for it would take time with the square of its length.
        kept["open_pattern"] = kept["open_pattern"].removeprefix(r"\s*")
    captured = re.findall(r"\(\?P<(\w+)>", field.get("open_pattern", "") + field.get("close_pattern", ""))
    transform = {"body": "{content}"} | {name: f"{{{name}}}" for name in captured}
    return {**kept, "repeats": True, "content": "text", "content_args": {"strip": False}, "transform": transform}


def _begins_something(event: Mapping[str, Any]) -> bool:
    """Whether what was held back to the end is the beginning of a marker."""
    if event["type"] == "region_chunk":
        return bool(event["text"].strip())
    return bool(event["type"] == "region_open" and event["field"] == "tool_calls")


def _function(call: Any) -> dict[str, Any]:
    """A call as templates write it: models leave out empty arguments, or write the object as a text of JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("no function is named")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str) and arguments.strip().startswith("{"):
        arguments = json.loads(arguments)
    return {"function": {"name": function["name"], "arguments": {} if arguments is None else arguments}}


def _deeper(value: Any, depth: int) -> bool:
    """Whether ``value`` is nested more than ``depth`` levels."""
    if not isinstance(value, dict | list):
        return False
    children = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_deeper(child, depth - 1) for child in children)

"""Parses the text of calls into names and arguments.

A call is parsed once it is complete, so an unreadable one ends its candidate and nothing else.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.api.events import FinishReason
from server.families.answer_syntax import AnswerSyntax
from server.families.family import BareKeyArguments, PythonArguments, TaggedArguments
from server.families.python_calls import python_calls, python_value
from server.families.splitter import BrokenCall, CallEnd, RegionEvent, RegionStart
from server.families.transformers_import import library

MAX_DEPTH = 64
"""Of a call's arguments: every program that gets them has to read and write them as JSON."""

_CAST = {"start_anchor_pattern": r"\A", "fields": {"tool_calls": {"content": "json"}}}
"""Reads calls that are already JSON: this gives access to the library's casting of arguments by their schemas."""
_UNREADABLE = "The model wrote a function call that cannot be read."


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete call of a declared function."""

    id: str
    name: str
    args: dict[str, Any]


class UnreadableCall(ValueError):
    """A call is complete and cannot be made; the message is a sentence for the client."""


class ToolCallReader:
    """Reads the calls of one candidate: ``feed`` events of its splitter, ``flush`` when the answer ended.

    ``problem`` says why the candidate's call cannot be made; nothing is read after it.
    """

    def __init__(self, syntax: AnswerSyntax) -> None:
        self.problem = ""
        self._syntax = syntax
        self._is_open = False
        self._made: set[str] = set()

    def feed(self, event: RegionEvent) -> list[ToolCall]:
        """The calls that ``event`` completes."""
        match event:
            case RegionStart(region):
                self._is_open = region == "call"
            case CallEnd(text, captures):
                self._is_open = False
                try:
                    return self._calls(text, captures)
                except UnreadableCall as problem:
                    self.problem = str(problem)
            case BrokenCall():
                self.problem = _UNREADABLE
        return []

    def flush(self, reason: FinishReason) -> None:
        """The answer ended. A call that is not complete is a problem, unless a limit cut it off."""
        if reason is not FinishReason.STOP:
            self.problem = ""
        elif self._is_open:
            self.problem = "The model ended its answer in the middle of a function call."

    def _calls(self, text: str, captures: Mapping[str, str]) -> list[ToolCall]:
        """What the text of a call says, without calls that the answer holds already. Raises ``UnreadableCall``."""
        parsing = library().chat_parsing
        try:
            found = self._found(text, captures)
            functions = [_function(call) for call in (found if isinstance(found, list) else [found])]
            written = json.dumps(functions, allow_nan=False)
            cast = parsing.parse_response(written, _CAST, prefix="", tools=self._syntax.tools)["tool_calls"]
        except (ValueError, KeyError, RecursionError):
            raise UnreadableCall(_UNREADABLE) from None
        calls = []
        for call in cast:
            name, args = call["function"]["name"], call["function"]["arguments"]
            if name not in self._syntax.tool_names:
                raise UnreadableCall(f"The model called {name[:128]!r}, which is not among the declared functions.")
            if not isinstance(args, dict):
                raise UnreadableCall(f"The model called {name} with arguments that are not an object.")
            if isinstance(self._syntax.arguments, TaggedArguments):
                args = {key: _structure(value, self._syntax.kind(name, key)) for key, value in args.items()}
            if _is_deeper(args, MAX_DEPTH):
                raise UnreadableCall(f"The model called {name} with arguments nested deeper than {MAX_DEPTH} levels.")
            content = json.dumps([name, args], sort_keys=True)
            if self._syntax.keeps_duplicates or content not in self._made:
                calls.append(ToolCall(f"call_{secrets.token_hex(8)}", name, args))
            self._made.add(content)
        return calls

    def _found(self, text: str, captures: Mapping[str, str]) -> Any:
        """A call or several, as the library would read them. Raises ``ValueError``."""
        syntax, process = self._syntax, library().chat_parsing.content_parsers.process_field
        if isinstance(syntax.arguments, PythonArguments):
            return python_calls(text)
        if isinstance(syntax.arguments, BareKeyArguments):
            text = _with_null(text, syntax.arguments.quote)
        if not syntax.calls_within:
            return process(text, syntax.call_field, captures)
        calls = list(re.finditer(syntax.calls_within, text, re.DOTALL))
        if not calls:
            raise ValueError("a section without calls")
        return [process(call["body"], syntax.call_field, {"name": call["name"].strip()}) for call in calls]


def _with_null(text: str, quote: str) -> str:
    """``None`` outside of quotes, which templates write where JSON has ``null``, as ``null``."""
    pieces = text.split(quote)
    pieces[::2] = (re.sub(r"(?<=[:,\[])None(?=[,\]}])", "null", piece) for piece in pieces[::2])
    return quote.join(pieces)


def _function(call: Any) -> dict[str, Any]:
    """A call as templates write it: models leave out empty arguments, or write the object as a text of JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("no function is named")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str) and arguments.strip().startswith("{"):
        arguments = json.loads(arguments)
    return {"function": {"name": function["name"], "arguments": {} if arguments is None else arguments}}


def _structure(value: Any, kind: str) -> Any:
    """A list or an object that the model wrote as Python does, as some templates do; everything else as it is."""
    if not isinstance(value, str) or kind not in ("array", "object"):
        return value
    try:
        found = python_value(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, list if kind == "array" else dict) else value


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether ``value`` is nested more than ``depth`` levels."""
    if not isinstance(value, dict | list):
        return False
    children = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_deeper(child, depth - 1) for child in children)

"""Families that write calls as Python does, ``[f(city='Paris'), g()]``, and what reads values in that notation.

Templates write texts between quotes without escaping what is in them, and objects as JSON. So the reader takes both
notations: a quote ends a text only where the call can go on behind it, and a line break in a text stands for itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from server.families.family import CallSyntax, Family, PythonArguments
from server.families.tagged_calls import THINK

_OPENING = r"""
{%- macro castor_value(value) -%}
{%- if value is string -%}
'{{ value | replace('\\', '\\\\') | replace("'", "\\'") | replace('\n', '\\n') }}'
{%- elif value is mapping or value is sequence -%}{{ value | tojson }}
{%- else -%}{{ value }}
{%- endif -%}
{%- endmacro -%}
{%- set castor = namespace(messages=[], calls='') -%}
{%- for message in messages -%}
{%- set castor.calls = '' -%}
{%- for call in message.tool_calls or [] -%}
{%- set castor.calls = castor.calls + ('' if loop.first else ', ') + call.function.name + '(' -%}
{%- for key, value in call.function.arguments.items() -%}
{%- set castor.calls = castor.calls + ('' if loop.first else ', ') + key + '=' + castor_value(value) -%}
{%- endfor -%}
{%- set castor.calls = castor.calls + ')' -%}
{%- endfor -%}
{%- set written = '<|tool_call_start|>[' + castor.calls + ']<|tool_call_end|>' if castor.calls else '' -%}
{%- set castor.messages = castor.messages + [dict(message, content=message.content + written)] -%}
{%- endfor -%}
{%- set messages = castor.messages -%}
"""

LFM2 = Family(
    name="lfm2",
    recognised_by=("<|tool_call_start|>",),
    incomplete=("<|im_start|>", "List of tools: "),
    opening=_OPENING,
    call=CallSyntax(
        response_field={
            "open": "<|tool_call_start|>",
            "close": "<|tool_call_end|>",
            "repeats": True,
            "content": "text",
        },
        trigger="<|tool_call_start|>",
        terminator="<|tool_call_end|>",
        section_start="<|tool_call_start|>[",
        call_start="",
        name_args_separator="(",
        call_end=")",
        call_separator=", ",
        section_end="]<|tool_call_end|>",
        arguments=PythonArguments(),
    ),
    thought=THINK,
    markers=("<|tool_call_start|>", "<|tool_call_end|>", *THINK),
)
"""LFM 2 and 2.5. Templates of many of them take calls as the text that the model wrote."""

_CONSTANTS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_WORD = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|\w+")
_NAME = re.compile(r"[A-Za-z_][\w.:-]*")
_KEYWORD = re.compile(r"[^\s'\"=,()\[\]{}][^'\"=,()\[\]{}]*")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "\n": ""}
_NEXT_ITEM = re.compile(r"\s*(?:[,)\]}:]|\Z)")
_NEXT_KEYWORD = re.compile(rf"\s*(?:,\s*{_KEYWORD.pattern}=|,?\s*\)|\Z)")


def python_calls(text: str) -> list[Any]:
    """The calls of a list, or a call alone, as ``name`` and ``arguments``. Raises ``ValueError``."""
    reader = _Reader(text)
    calls = reader.items("[", reader.call, "]") if reader.sees("[") else [reader.call()]
    reader.end()
    return calls


def python_value(text: str) -> Any:
    """A value as Python or JSON writes it. Raises ``ValueError``."""
    reader = _Reader(text)
    value = reader.value()
    reader.end()
    return value


class _Reader:
    """Reads ``text`` from its beginning; every method raises ``ValueError`` for what is not its kind."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def sees(self, sign: str) -> bool:
        """Whether ``sign`` comes next, after white space."""
        while self._text[self._at : self._at + 1].isspace():
            self._at += 1
        return self._text.startswith(sign, self._at)

    def end(self) -> None:
        if not self.sees("") or self._at < len(self._text):
            raise ValueError("something follows")

    def items(self, start: str, item: Callable[[], Any], end: str) -> list[Any]:
        """What stands between ``start`` and ``end``, parted by commas; a comma may come last."""
        self._take(start)
        found = []
        while not self.sees(end):
            found.append(item())
            if not self.sees(end):
                self._take(",")
        self._take(end)
        return found

    def call(self) -> Any:
        if self.sees("{"):  # some templates write earlier calls as JSON
            return self.value()
        name = self._matched(_NAME)
        return {"name": name, "arguments": dict(self.items("(", self._keyword, ")"))}

    def value(self, follows: re.Pattern[str] = _NEXT_ITEM) -> Any:
        """``follows`` matches what may stand behind a text."""
        for quote in "'\"":
            if self.sees(quote):
                return self._quoted(quote, follows)
        if self.sees("["):
            return self.items("[", self.value, "]")
        if self.sees("{"):
            return dict(self.items("{", self._member, "}"))
        word = self._matched(_WORD)
        if word in _CONSTANTS:
            return _CONSTANTS[word]
        return int(word) if re.fullmatch(r"-?\d+", word) else float(word)

    def _keyword(self) -> tuple[str, Any]:
        name = self._matched(_KEYWORD).rstrip()
        self._take("=")
        return name, self.value(_NEXT_KEYWORD)

    def _member(self) -> tuple[str, Any]:
        key = self.value()
        if not isinstance(key, str):
            raise ValueError("a key is no text")
        self._take(":")
        return key, self.value()

    def _quoted(self, quote: str, follows: re.Pattern[str]) -> str:
        start = place = self._at + 1
        while place < len(self._text):
            if self._text[place] == "\\":
                place += 2
                continue
            if self._text[place] == quote and follows.match(self._text, place + 1):
                self._at = place + 1
                return _unescaped(self._text[start:place])
            place += 1
        raise ValueError("a text does not end")

    def _matched(self, pattern: re.Pattern[str]) -> str:
        self.sees("")
        match = pattern.match(self._text, self._at)
        if match is None:
            raise ValueError("something else was expected")
        self._at = match.end()
        return match.group()

    def _take(self, sign: str) -> None:
        if not self.sees(sign):
            raise ValueError(f"{sign} is missing")
        self._at += len(sign)


def _unescaped(text: str) -> str:
    """A text without its escapes; those that Python does not know stay as they are."""

    def character(match: re.Match[str]) -> str:
        number, sign = match[1] or match[2] or match[3], match[4]
        if number:
            return chr(int(number, 16))
        return _ESCAPED.get(sign, sign if sign in "\\'\"/" else match[0])

    # JSON writes a character beyond the first 65,536 as two escapes.
    return _ESCAPE.sub(character, text).encode("utf-16", "surrogatepass").decode("utf-16")

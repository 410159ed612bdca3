"""The text of an answer as regions: plain text, thoughts, calls, and markup that is not shown.

transformers' streaming parser finds the family's markers. It does not know that a marker within a JSON string or after
the start of a constrained answer is plain text, nor how a call ends that is cut off by the end of the answer. This
module adapts it, so that nothing else sees it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.api.events import FinishReason
from server.families.answer_syntax import AnswerSyntax
from server.families.transformers_import import library

_MARKUP = "<>[]{};"
_DISGUISE = {ord(char): 0xF0000 + ord(char) for char in _MARKUP}
"""Applied to JSON strings: every marker has one of these characters, and none has one for private use."""
_REVEAL = {shifted: char for char, shifted in _DISGUISE.items()}
_BLOCKS = re.compile(rf'[^"\\\n{re.escape(_MARKUP)}]+|.', re.DOTALL)
"""Text in pieces before and after which a JSON string or a marker may begin or end."""
_NO_MARKER = "\0"
"""Continues no marker."""


Region = Literal["answer", "thought", "call", "markup"]
"""The kinds of stretches of an answer."""
_REGIONS: Mapping[str, Region] = {
    "content": "answer",
    "reasoning_content": "thought",
    "reasoning": "thought",
    "thinking": "thought",
    "tool_calls": "call",
}
"""By the fields of response templates; all others hold markup."""


@dataclass(frozen=True, slots=True)
class RegionStart:
    """A region begins, and the one before it has ended. An answer that begins with plain text has a start too."""

    region: Region


@dataclass(frozen=True, slots=True)
class RegionText:
    """Some of an answer's text or thoughts, in a region that has started."""

    region: Region
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call is complete. ``text`` stood between its markers, ``captures`` is what these hold, such as the name."""

    text: str
    captures: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class BrokenCall:
    """A call begins, but what follows is not the family's syntax."""


RegionEvent = RegionStart | RegionText | CallEnd | BrokenCall


class RegionSplitter:
    """Splits one candidate: ``feed`` text as it comes, ``flush`` when it ended.

    Events are the same however the text was cut, once neighbouring texts of a region are joined.
    """

    def __init__(self, syntax: AnswerSyntax) -> None:
        self._syntax = syntax
        self._parser = library().chat_parsing.ResponseParser(syntax.regions, prefix=syntax.prefix)
        self._string = _JsonString() if syntax.quotes_json else None
        self._in_call = False
        self._only_text = False
        self._undecided = "" if syntax.call_starts else None

    def feed(self, text: str) -> list[RegionEvent]:
        """What ``text`` adds for certain; what may be part of a marker is held back."""
        if self._undecided is not None:
            text = self._undecided + text
            self._undecided = text if any(start.startswith(text) for start in self._syntax.call_starts) else None
            if self._undecided is not None and text not in self._syntax.call_starts:
                return []
            self._undecided = None
            if not text.startswith(self._syntax.call_starts):
                self._only_text = True
                return [RegionStart("answer"), RegionText("answer", text)]
        if self._only_text:
            return [RegionText("answer", text)]
        events: list[RegionEvent] = []
        for block in _BLOCKS.findall(text) if self._string or self._syntax.constrained else [text]:
            if self._only_text:
                events.append(RegionText("answer", block))
                continue
            quoted = self._in_call and self._string is not None and self._string.is_open
            added = self._events(self._parser.feed(block.translate(_DISGUISE) if quoted else block))
            if self._syntax.constrained:
                said = (event.text for event in added if isinstance(event, RegionText) and event.region == "answer")
                if not all(map(str.isspace, said)):
                    self._only_text = True
                    added += self._events(self._parser.finalize()[1])
            events += added
        return events

    def flush(self, reason: FinishReason) -> list[RegionEvent]:
        """What was held back. Where a limit cut the answer off, the beginning of a marker is not shown.

        A call without its last marker ends here if it holds JSON, else not at all.
        """
        if self._undecided:
            return [RegionStart("answer"), RegionText("answer", self._undecided)]
        if self._only_text:
            return []
        was_cut = reason is not FinishReason.STOP
        events: list[RegionEvent] = []
        if self._syntax.calls_in_tags and (self._in_call or not was_cut):
            # A last marker that more text could have extended is complete.
            for event in self._events(self._parser.feed(_NO_MARKER)):
                if not isinstance(event, RegionText):
                    events.append(event)
                elif shown := event.text.replace(_NO_MARKER, ""):
                    events.append(RegionText(event.region, shown))
            if self._in_call:
                return events
        was_in_call = self._in_call
        last = self._events(self._parser.finalize()[1])
        for event in last if was_cut and not was_in_call else ():
            is_word = isinstance(event, RegionText) and not event.text.isspace()
            if is_word or event in (RegionStart("call"), BrokenCall()):
                return [*events, RegionStart("markup")]
        return [*events, *last]

    def _events(self, found: list[dict[str, Any]]) -> list[RegionEvent]:
        """What transformers' parser found, as events of this module."""
        events: list[RegionEvent] = []
        for event in found:
            kind, region = event["type"], _REGIONS.get(event["field"], "markup")
            if kind == "region_open":
                self._in_call = region == "call"
                if self._in_call and self._string:
                    self._string = _JsonString()
                events.append(RegionStart(region))
            elif kind == "region_chunk" and region == "call":
                if self._string:
                    self._string.feed(event["text"])
            elif kind == "region_chunk" and region != "markup":
                # The sign of a call in plain text begins a broken call: the parser found no call syntax after it.
                sign = self._syntax.sign if region == "answer" else ""
                text, broken, _ = event["text"].partition(sign) if sign else (event["text"], "", "")
                if text:
                    events.append(RegionText(region, text))
                if broken:
                    events.append(BrokenCall())
            elif kind == "region_close" and region == "call":
                self._in_call = False
                captures = {name: text.strip() for name, text in event["value"].items() if name != "body"}
                events.append(CallEnd(event["value"]["body"].translate(_REVEAL), captures))
        return events


class _JsonString:
    """Follows JSON text, and knows whether it is within a string."""

    def __init__(self) -> None:
        self.is_open = False
        self._is_escaped = False

    def feed(self, text: str) -> None:
        for char in text:
            if self._is_escaped:
                self._is_escaped = False
            elif char == '"':
                self.is_open = not self.is_open
            else:
                self._is_escaped = self.is_open and char == "\\"

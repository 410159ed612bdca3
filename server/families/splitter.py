"""The text of an answer as regions: plain text, thoughts, calls, and markup that nobody sees.

transformers' streaming parser finds the family's markers. It knows neither that a marker within a JSON string is text,
nor that one behind the beginning of a constrained answer is, nor how a call ends that the answer's end cuts off. What
adapts it stands here, so that nothing else sees it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from engine.api.events import FinishReason
from server.families.answer_syntax import AnswerSyntax
from server.families.transformers_import import library

_MARKUP = "<>[]{};"
_DISGUISE = {ord(char): 0xF0000 + ord(char) for char in _MARKUP}
"""For JSON strings: every marker has one of these characters, and none has one of those for private use."""
_REVEAL = {shifted: char for char, shifted in _DISGUISE.items()}
_BLOCKS = re.compile(rf'[^"\\\n{re.escape(_MARKUP)}]+|.', re.DOTALL)
"""Text in pieces before and after which a JSON string or a marker may begin or end."""
_NO_MARKER = "\0"
"""Continues no marker."""


class Region(Enum):
    """What a stretch of an answer is."""

    ANSWER = auto()
    THOUGHT = auto()
    CALL = auto()
    MARKUP = auto()


_REGIONS = {
    "content": Region.ANSWER,
    "reasoning_content": Region.THOUGHT,
    "reasoning": Region.THOUGHT,
    "thinking": Region.THOUGHT,
    "tool_calls": Region.CALL,
}
"""By the fields of response templates; all others hold markup."""


@dataclass(frozen=True, slots=True)
class RegionStart:
    """A region begins, and the one before it has ended. An answer that begins with plain text has a start too."""

    region: Region


@dataclass(frozen=True, slots=True)
class RegionText:
    """Some of the text of a region that has started."""

    region: Region
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A region of a call is complete; ``captures`` is what its markers hold, such as the name of the function."""

    captures: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class BrokenCall:
    """The answer says that a call begins, and none of the family's syntax follows."""


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

    def feed(self, text: str) -> list[RegionEvent]:
        """What ``text`` adds for certain; what may be part of a marker is held back."""
        events: list[RegionEvent] = []
        for block in _BLOCKS.findall(text) if self._string or self._syntax.constrained else [text]:
            if self._only_text:
                events.append(RegionText(Region.ANSWER, block))
                continue
            quoted = self._in_call and self._string is not None and self._string.is_open
            added = list(self._events(self._parser.feed(block.translate(_DISGUISE) if quoted else block)))
            if self._syntax.constrained and any(map(_is_answer, added)):
                self._only_text = True
                added += self._events(self._parser.finalize()[1])
            events += added
        return events

    def flush(self, reason: FinishReason) -> list[RegionEvent]:
        """What was held back. Where a limit cut the answer off, the beginning of a marker is not shown.

        A call without its last marker ends here if it holds JSON, else not at all.
        """
        if self._only_text:
            return []
        was_cut = reason is not FinishReason.STOP
        events: list[RegionEvent] = []
        if self._syntax.calls_in_tags and (self._in_call or not was_cut):
            # A last marker that more text could prolong is complete now.
            for event in self._events(self._parser.feed(_NO_MARKER)):
                if not isinstance(event, RegionText):
                    events.append(event)
                elif shown := event.text.replace(_NO_MARKER, ""):
                    events.append(RegionText(event.region, shown))
            if self._in_call:
                return events
        was_in_call = self._in_call
        _, last = self._parser.finalize()
        if was_cut and not was_in_call and any(map(_begins_marker, last)):
            return [*events, RegionStart(Region.MARKUP)]
        return [*events, *self._events(last)]

    def _events(self, found: list[dict[str, Any]]) -> Iterator[RegionEvent]:
        """What transformers' parser found."""
        for event in found:
            kind, region = event["type"], _REGIONS.get(event["field"], Region.MARKUP)
            if kind == "region_open":
                self._in_call = region is Region.CALL
                if self._in_call and self._string:
                    self._string = _JsonString()
                yield RegionStart(region)
            elif kind == "region_chunk" and region is Region.CALL:
                if self._string:
                    self._string.feed(event["text"])
                yield RegionText(region, event["text"].translate(_REVEAL))
            elif kind == "region_chunk" and region is Region.ANSWER:
                # The marker of a call is no text: here it stands before what is no call.
                trigger = self._syntax.trigger
                before, broken, _ = event["text"].partition(trigger) if trigger else (event["text"], "", "")
                if before:
                    yield RegionText(region, before)
                if broken:
                    yield BrokenCall()
            elif kind == "region_chunk" and region is Region.THOUGHT:
                yield RegionText(region, event["text"])
            elif kind == "region_close" and region is Region.CALL:
                self._in_call = False
                yield CallEnd({name: text.strip() for name, text in event["value"].items() if name != "body"})


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


def _is_answer(event: RegionEvent) -> bool:
    """Whether this is plain text that is more than white space."""
    return isinstance(event, RegionText) and event.region is Region.ANSWER and not event.text.isspace()


def _begins_marker(event: Mapping[str, Any]) -> bool:
    """Whether what was held back to the end is the beginning of a marker."""
    if event["type"] == "region_chunk":
        return bool(event["text"].strip())
    return bool(event["type"] == "region_open" and event["field"] == "tool_calls")

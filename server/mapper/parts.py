"""The text of an answer as parts: what the model says, what it thinks, and the functions that it calls.

Each stage takes input with ``feed`` and returns the rest with ``flush``::

    text ──▶ RegionSplitter ─┬─ answer, thoughts ──▶ WhitespaceTrimmer ──▶ Text, Thought
                             └─ calls ─────────────▶ ToolCallReader ─────▶ ToolCall, or a problem

The states of a candidate; what is in brackets ends its text::

      the prompt opened no thoughts                      the prompt opened thoughts
                 │                                                   │
                 ▼              opening of thoughts                  ▼
              ANSWER ─────────────────────────────────────────▶  THOUGHT
               ▲  │  ◀─────────────────────────────────────────
    end of a   │  │                  their closing
    call, read │  │ opening of a call
               │  ▼
              CALL ── its end, unreadable; end of the answer within tags ──▶ [problem]
               │
               └──── end of the answer, JSON that is whole ──▶ [ToolCall]

Markup, such as the header of a channel, is an ANSWER of no text. An answer that a limit cuts off has no problem: what
it left unfinished is dropped. Where a grammar governs the answer, ANSWER is the last state from its first word on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.api.events import FinishReason
from server.families.answer_syntax import AnswerSyntax
from server.families.family import Family
from server.families.splitter import CallEnd, RegionEvent, RegionSplitter, RegionStart, RegionText
from server.families.tool_call_reader import ToolCall, ToolCallReader
from server.mapper.whitespace import WhitespaceTrimmer


@dataclass(frozen=True, slots=True)
class Text:
    """Some of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Some of the thoughts."""

    text: str


Piece = Text | Thought | ToolCall


class PartsParser:
    """Reads one candidate: ``feed`` text as it comes, ``flush`` when it ended.

    Pieces are the same however the text was cut, once neighbours of a kind are joined. White space stays as the model
    wrote it, except beside thoughts and calls.
    """

    def __init__(self, syntax: AnswerSyntax) -> None:
        self._splitter = RegionSplitter(syntax)
        self._calls = ToolCallReader(syntax)
        self._trimmer = WhitespaceTrimmer(in_thought=bool(syntax.prefix))
        self._last: type[Piece] | None = None
        self._is_at_border = False

    @property
    def problem(self) -> str:
        """Why the candidate's call cannot be made, as a sentence; nothing comes after it. "" where there is none."""
        return self._calls.problem

    def feed(self, text: str) -> list[Piece]:
        """What ``text`` adds for certain."""
        return [] if self.problem else self._pieces(self._splitter.feed(text))

    def flush(self, reason: FinishReason) -> list[Piece]:
        """The rest. A call without its last marker is taken if it is whole; no fragment of one is shown."""
        if self.problem:
            return []
        pieces = self._pieces(self._splitter.flush(reason))
        self._calls.flush(reason)
        if not self.problem and (space := self._trimmer.flush()):
            pieces.append(Text(space))
        return pieces

    def _pieces(self, events: Iterable[RegionEvent]) -> list[Piece]:
        pieces: list[Piece] = []
        for event in events:
            if isinstance(event, RegionText):
                if shown := self._trimmer.feed(event.text):
                    kind = Thought if event.region == "thought" else Text
                    if self._is_at_border and self._last is kind:
                        # Two regions of one kind with nothing but markers between them do not run together.
                        shown = f"\n{shown}"
                    pieces.append(kind(shown))
                    self._last, self._is_at_border = kind, False
                continue
            if isinstance(event, RegionStart):
                self._trimmer.start_region(is_answer=event.region == "answer")
                self._is_at_border = True
            elif isinstance(event, CallEnd):
                self._last = ToolCall
            pieces += self._calls.feed(event)
            if self.problem:
                break
        return pieces


def answer_parser(
    family: Family,
    tools: Sequence[Mapping[str, Any]] = (),
    open_thought: bool = False,
    constrained: bool = False,
    call_starts: Sequence[str] = (),
) -> Callable[[], PartsParser] | None:
    """What makes a parser for each candidate, see `AnswerSyntax`; None where an answer can be nothing but text."""
    if not tools and not family.thought:
        return None
    syntax = AnswerSyntax(family, tools, open_thought, constrained, call_starts)
    return lambda: PartsParser(syntax)

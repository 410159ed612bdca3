"""What is known of a family of models: how it writes thoughts and calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Field = Mapping[str, Any]
"""One field of a response template of transformers (``transformers.utils.chat_parsing``)."""


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How calls are written: ``opening``, calls joined by ``separator``, ``closing``; a call is ``before``, the name,
    ``between``, the arguments, ``after``.

    ``begin`` is the text that tells that a call begins and ``end`` the one that ends it; "" where nothing but the
    beginning or the end of the answer does. ``arguments`` are a JSON object, the parameters in XML-like tags, or an
    object with bare keys and texts between ``quote``, which is a token. ``field`` reads calls back: ``tool_calls`` of
    the response template. ``parallel`` tells that an answer may hold several calls, ``repeats`` that the same call may
    stand in it twice.
    """

    field: Field
    begin: str
    end: str
    before: str
    between: str
    after: str
    opening: str = ""
    separator: str = "\n"
    closing: str = ""
    arguments: Literal["json", "xml", "quoted"] = "json"
    quote: str = ""
    parallel: bool = True
    repeats: bool = True


@dataclass(frozen=True, slots=True)
class Family:
    """What is known of a family of models.

    ``signs`` are literals that are all in the chat template. ``thought`` are the texts around
    thoughts, None where the model cannot think. ``markers`` are the texts of tokens, often special ones, that the
    parser must see. ``ends`` are tokens that end an answer, besides those that the model's files name. ``lead`` is
    what stands before an answer's plain text. ``renders_tools`` is False where Castor's own prompt declares functions
    and shows calls. ``thinking_switch`` is the template's variable that turns thinking on or off, ``effort_switch``
    the one that takes low, medium or high, if it has them. ``reasoning_key`` is where messages hold earlier thoughts.
    """

    name: str
    signs: tuple[str, ...]
    call: CallSyntax
    thought: tuple[str, str] | None = None
    markers: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    lead: str = ""
    content: Field = field(default_factory=lambda: {"content": "text", "content_args": {"strip": False}})
    other_fields: Mapping[str, Field] = field(default_factory=dict)
    renders_tools: bool = True
    thinking_switch: str | None = None
    effort_switch: str | None = None
    reasoning_key: str = "reasoning_content"
    own_fields: Mapping[str, Field] | None = None

    @property
    def exempt(self) -> tuple[tuple[str, str], ...]:
        """Where stop sequences do not count although it is no call: the lead, from its beginning to its end."""
        if not self.lead:
            return ()
        end = self.lead.rindex("<")
        return ((self.lead[:end], self.lead[end:]),)

    def response_template(self, calls: bool) -> dict[str, Any]:
        """What transformers' ``ResponseParser`` needs: fields ``reasoning_content``, ``tool_calls`` and ``content``,
        and sometimes others that hold nothing but markup. Without ``calls`` a call is plain text.

        The parser's prefix is what the prompt already wrote of the answer, the opened thoughts or nothing.
        """
        fields: dict[str, Field] = dict(self.own_fields) if self.own_fields else self._fields()
        if not calls:
            fields.pop("tool_calls", None)
        return {"defaults": {}, "fields": {n: dict(f) for n, f in fields.items()}, "start_anchor_pattern": r"\A"}

    def _fields(self) -> dict[str, Field]:
        fields: dict[str, Field] = {"tool_calls": self.call.field, "content": self.content, **self.other_fields}
        if self.thought:
            begin, end = self.thought
            fields["reasoning_content"] = {"open": begin, "close": end, "content": "text"}
        return fields

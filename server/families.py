"""Model families: where a model writes its thoughts and its calls, as one table.

A family is recognised by literal markers in its chat template. The table holds what the parser of answers, the grammar
of calls and the switch of thinking need to know; nothing else in the server knows a family by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Field = Mapping[str, Any]
"""One field of a response template of transformers (``transformers.utils.chat_parsing``)."""

_FUNCTION = {"type": "function", "function": "{content}"}
_NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_LISTED = {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}}


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


THINK = ("<think>", "</think>")

HERMES_CALL = CallSyntax(
    field={
        "open_pattern": r"\s*<tool_call>",
        "close": "</tool_call>",
        "repeats": True,
        "content": "json",
        "transform": _FUNCTION,
    },
    begin="<tool_call>",
    end="</tool_call>",
    before='<tool_call>\n{"name": "',
    between='", "arguments": ',
    after="}\n</tool_call>",
)
"""JSON in tags: what Hermes, Qwen and Granite 4 learned, and what Castor's own prompt asks of any other model."""

_XML_CALL = CallSyntax(
    field={
        "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
        "close_pattern": r"</function>\s*</tool_call>",
        "repeats": True,
        "content": "xml-inline",
        "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"},
        "transform": _NAMED,
    },
    begin="<tool_call>",
    end="</tool_call>",
    before="<tool_call>\n<function=",
    between=">\n",
    after="</function>\n</tool_call>",
    arguments="xml",
)

_LLAMA_CALL = CallSyntax(
    field={
        "open_pattern": r'(?:\A\s{0,8}(?:<\|python_tag\|>)?|(?<=\}\s{0,4};\s{0,4}))(?=\{\s{0,8}"name"\s?:\s?")',
        "close_pattern": r'(?<=\})\s{0,4};\s{0,4}(?=\{\s{0,8}"name"\s?:\s?")',
        "repeats": True,
        "content": "json",
        "transform": {"type": "function", "function": {"name": "{content.name}", "arguments": "{content.parameters}"}},
    },
    begin="",
    end="",
    before='{"name": "',
    between='", "parameters": ',
    after="}",
    separator="; ",
)

_MISTRAL_CALL = CallSyntax(
    field={
        "open_pattern": r"\s*\[TOOL_CALLS\](?P<name>[^\[\{]+)(?:\[CALL_ID\]\w+)?\[ARGS\]",
        "close_pattern": r"(?=\[TOOL_CALLS\])",
        "repeats": True,
        "content": "json",
        "transform": _NAMED,
    },
    begin="[TOOL_CALLS]",
    end="",
    before="[TOOL_CALLS]",
    between="[ARGS]",
    after="",
    separator="",
)


def _listed(opening: str, closing: str, begin: str) -> CallSyntax:
    """Calls as one JSON list behind a marker."""
    marker = {"open": begin} | ({"close": closing[1:]} if len(closing) > 1 else {})
    return CallSyntax(
        field={**marker, "content": "json", "transform": _LISTED, "transform_each": True},
        begin=begin,
        end=closing[1:],
        opening=opening,
        before='{"name": "',
        between='", "arguments": ',
        after="}",
        separator=", ",
        closing=closing,
    )


def _deepseek(head: str, between: str, tail: str, separator: str) -> CallSyntax:
    """Calls between tokens of their own; generations differ in what stands around name and arguments."""
    name = rf"{head}<｜tool▁sep｜>(?P<name>[^\n]+)\n```json\n" if head else r"(?P<name>[^<]+)<｜tool▁sep｜>"
    return CallSyntax(
        field={
            "open_pattern": rf"\s*(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>{name}",
            "close": tail,
            "repeats": True,
            "content": "json",
            "transform": _NAMED,
        },
        begin="<｜tool▁calls▁begin｜>",
        end="<｜tool▁calls▁end｜>",
        opening="<｜tool▁calls▁begin｜>",
        before=f"<｜tool▁call▁begin｜>{head}" + ("<｜tool▁sep｜>" if head else ""),
        between=between,
        after=tail,
        separator=separator,
        closing="<｜tool▁calls▁end｜>",
    )


_DEEPSEEK_END = {"calls_end": {"open_pattern": r"\s*<｜tool▁calls▁end｜>", "close_pattern": "", "repeats": True}}
_DEEPSEEK_MARKERS = (
    "<think>",
    "</think>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)

_HARMONY_CALL = CallSyntax(
    field={
        "open_pattern": r"(?:<\|start\|>assistant)?(?:<\|channel\|>commentary)? ?to=functions\.(?P<name>[^\s<]+)"
        r"(?:<\|channel\|>commentary)?[^<\n]{0,32}(?:<\|constrain\|>\w+)?\s?<\|message\|>",
        "close_pattern": r"<\|call\|>|(?=<\|start\|>)",
        "repeats": True,
        "content": "json",
        "transform": _NAMED,
    },
    begin="<|channel|>commentary to=",
    end="",
    before="<|channel|>commentary to=functions.",
    between=" <|constrain|>json<|message|>",
    after="",
    parallel=False,
)

_GEMMA_CALL = CallSyntax(
    field={
        "open_pattern": r"\s*<\|tool_call>call:(?P<name>[^{]+)",
        "close": "<tool_call|>",
        "repeats": True,
        "content": "json",
        "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
        "transform": _NAMED,
    },
    begin="<|tool_call>",
    end="<tool_call|>",
    before="<|tool_call>call:",
    between="",
    after="<tool_call|>",
    separator="",
    arguments="quoted",
    quote='<|"|>',
)

_CALL_MARKERS = ("<tool_call>", "</tool_call>", *THINK)

CASTOR = Family(
    name="castor",
    signs=(),
    call=replace(HERMES_CALL, repeats=False),
    thought=THINK,
    markers=_CALL_MARKERS,
    renders_tools=False,
)
"""The family of every other model, and what it is asked to do by Castor's own prompt. Models that never learned to call
make the same call again for as long as they may; so a call that equals an earlier one of its answer is none."""

FAMILIES = (
    Family(
        name="gpt-oss",
        signs=("<|channel|>",),
        call=_HARMONY_CALL,
        thought=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
        markers=("<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>", "<|return|>"),
        ends=("<|return|>", "<|call|>"),
        lead="<|channel|>final<|message|>",
        reasoning_key="thinking",
        content={"close_pattern": r"<\|end\|>|<\|return\|>", "content": "text", "content_args": {"strip": False}},
        other_fields={
            "header": {
                "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary)\s*"
                r"(?:<\|constrain\|>\w+\s*)?<\|message\|>",
                "close_pattern": "",
                "repeats": True,
            }
        },
    ),
    Family(
        name="gemma4",
        signs=("<|tool_call>",),
        call=_GEMMA_CALL,
        thought=("<|channel>thought\n", "<channel|>"),
        markers=("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'),
    ),
    Family(name="qwen-xml", signs=("<function=", "<parameter="), call=_XML_CALL, thought=THINK, markers=_CALL_MARKERS),
    Family(
        name="deepseek-r1",
        signs=("<｜tool▁call▁begin｜>", "```json"),
        call=_deepseek("function", "\n```json\n", "\n```<｜tool▁call▁end｜>", "\n"),
        thought=THINK,
        markers=_DEEPSEEK_MARKERS,
        other_fields=_DEEPSEEK_END,
    ),
    Family(
        name="deepseek",
        signs=("<｜tool▁call▁begin｜>",),
        call=_deepseek("", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", ""),
        thought=THINK,
        markers=_DEEPSEEK_MARKERS,
        other_fields=_DEEPSEEK_END,
    ),
    Family(
        name="mistral",
        signs=("[ARGS]",),
        call=_MISTRAL_CALL,
        thought=("[THINK]", "[/THINK]"),
        markers=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[THINK]", "[/THINK]"),
    ),
    Family(
        name="mistral-list",
        signs=("[TOOL_CALLS]",),
        call=_listed("[TOOL_CALLS][", "]", "[TOOL_CALLS]"),
        markers=("[TOOL_CALLS]",),
    ),
    Family(
        name="phi",
        signs=("<|/tool_call|>",),
        call=_listed("<|tool_call|>[", "]<|/tool_call|>", "<|tool_call|>"),
        thought=THINK,
        markers=("<|tool_call|>", "<|/tool_call|>", *THINK),
    ),
    Family(
        name="granite",
        signs=("<|tool_call|>",),
        call=_listed("<|tool_call|>[", "]", "<|tool_call|>"),
        thought=THINK,
        markers=("<|tool_call|>", *THINK),
    ),
    Family(name="hermes", signs=("<tool_call>",), call=HERMES_CALL, thought=THINK, markers=_CALL_MARKERS),
    Family(
        name="llama3",
        signs=("<|eot_id|>", '"parameters": '),
        call=_LLAMA_CALL,
        markers=("<|python_tag|>",),
        ends=("<|eom_id|>",),
    ),
)
"""The first whose signs are in the template is the one: rare signs stand before those that several families share."""

_SWITCHES = {"enable_thinking": r"\benable_thinking\b", "thinking": r"(?<![\w.])thinking is (?:not )?defined"}


def family_of(
    chat_template: str, renders_tools: bool = True, response_template: Mapping[str, Any] | None = None
) -> Family:
    """The family that a chat template belongs to.

    ``renders_tools`` tells whether the template shows declared functions to the model; where it does not, calls are
    written as Castor's own prompt asks. ``response_template`` is the tokenizer's own, and wins for reading.
    A model thinks where its template knows the markers of thoughts.
    """
    found = next((family for family in FAMILIES if all(sign in chat_template for sign in family.signs)), CASTOR)
    thought = found.thought if found.thought and _knows(chat_template, found.thought) else None
    if not renders_tools:
        found = replace(found, call=CASTOR.call, markers=(*found.markers, *CASTOR.markers), renders_tools=False)
    own = dict(response_template["fields"]) if response_template and renders_tools else None
    if thought is None:
        return replace(found, thought=None, own_fields=own)
    switch = next((name for name, use in _SWITCHES.items() if re.search(use, chat_template)), None)
    effort = "reasoning_effort" if "reasoning_effort" in chat_template else None
    return replace(found, thought=thought, thinking_switch=switch, effort_switch=effort, own_fields=own)


def _knows(chat_template: str, thought: tuple[str, str]) -> bool:
    return any(marker.strip() in chat_template for marker in thought)

"""Model families: where a model writes its thoughts and its calls, as one table.

A family is recognised by literal markers in its chat template. The table holds what the parser of answers, the grammar
of calls and the switch of thinking need to know; nothing else in the server knows a family by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from server.families.family import CallSyntax, Family

_FUNCTION = {"type": "function", "function": "{content}"}
_NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_LISTED = {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}}


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

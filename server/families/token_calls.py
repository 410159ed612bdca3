"""Families that write the parts of calls between tokens of their own: DeepSeek, Kimi and newer Mistral models.

DeepSeek's generations differ in what surrounds the name."""

from __future__ import annotations

from server.families.family import CallSyntax, Family
from server.families.tagged_calls import THINK

_MARKUP = {"calls_end": {"open_pattern": r"\s*<｜tool▁calls▁end｜>", "close_pattern": "", "repeats": True}}
_MARKERS = (
    *THINK,
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)


def _calls(name_pattern: str, before_name: str, name_args_separator: str, tail: str, call_separator: str) -> CallSyntax:
    """``before_name`` comes between the token that begins a call and the name, ``tail`` after the arguments."""
    return CallSyntax(
        response_field={
            "open_pattern": rf"\s*(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>{name_pattern}",
            "close": tail,
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        trigger="<｜tool▁calls▁begin｜>",
        terminator="<｜tool▁calls▁end｜>",
        section_start="<｜tool▁calls▁begin｜>",
        call_start=f"<｜tool▁call▁begin｜>{before_name}",
        name_args_separator=name_args_separator,
        call_end=tail,
        call_separator=call_separator,
        section_end="<｜tool▁calls▁end｜>",
    )


DEEPSEEK_R1 = Family(
    name="deepseek-r1",
    recognised_by=("<｜tool▁call▁begin｜>", "```json"),
    call=_calls(
        name_pattern=r"function<｜tool▁sep｜>(?P<name>[^\n]+)\n```json\n",
        before_name="function<｜tool▁sep｜>",
        name_args_separator="\n```json\n",
        tail="\n```<｜tool▁call▁end｜>",
        call_separator="\n",
    ),
    thought=THINK,
    markers=_MARKERS,
    markup_fields=_MARKUP,
)

DEEPSEEK = Family(
    name="deepseek",
    recognised_by=("<｜tool▁call▁begin｜>",),
    call=_calls(
        name_pattern=r"(?P<name>[^<]+)<｜tool▁sep｜>",
        before_name="",
        name_args_separator="<｜tool▁sep｜>",
        tail="<｜tool▁call▁end｜>",
        call_separator="",
    ),
    thought=THINK,
    markers=_MARKERS,
    markup_fields=_MARKUP,
)
"""DeepSeek V3.1."""

KIMI = Family(
    name="kimi-k2",
    recognised_by=("<|tool_call_argument_begin|>",),
    call=CallSyntax(
        response_field={
            "open_pattern": r"\s*(?:<\|tool_calls_section_begin\|>\s*)?<\|tool_call_begin\|>\s*(?:functions\.)?"
            r"(?P<name>[^<\s]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>",
            "close": "<|tool_call_end|>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        trigger="<|tool_calls_section_begin|>",
        terminator="<|tool_calls_section_end|>",
        section_start="<|tool_calls_section_begin|>",
        call_start="<|tool_call_begin|>functions.",
        number_mark=":",
        call_id="functions.{name}:{number}",
        name_args_separator="<|tool_call_argument_begin|>",
        call_end="<|tool_call_end|>",
        call_separator="",
        section_end="<|tool_calls_section_end|>",
    ),
    thought=THINK,
    markers=(
        *THINK,
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
    ),
    markup_fields={
        "calls_end": {"open_pattern": r"\s*<\|tool_calls_section_end\|>", "close_pattern": "", "repeats": True}
    },
)
"""Kimi K2, and K2-Thinking, which always thinks."""

MISTRAL = Family(
    name="mistral",
    recognised_by=("[ARGS]",),
    call=CallSyntax(
        response_field={
            "open_pattern": r"\s*\[TOOL_CALLS\](?P<name>[^\[\{]+)(?:\[CALL_ID\]\w+)?\[ARGS\]",
            "close_pattern": r"(?=\[TOOL_CALLS\])",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        trigger="[TOOL_CALLS]",
        terminator="",
        call_start="[TOOL_CALLS]",
        name_args_separator="[ARGS]",
        call_end="",
        call_separator="",
    ),
    thought=("[THINK]", "[/THINK]"),
    markers=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[THINK]", "[/THINK]"),
)

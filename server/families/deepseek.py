"""DeepSeek's families: calls between tokens of their own. Generations differ in what surrounds the name."""

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

"""Mistral's families: newer models write the name of a function and its arguments apart, older ones a list of calls."""

from __future__ import annotations

from server.families.family import CallSyntax, Family
from server.families.plain_json_calls import json_list

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

MISTRAL_LIST = Family(
    name="mistral-list",
    recognised_by=("[TOOL_CALLS]",),
    call=json_list("[TOOL_CALLS]"),
    markers=("[TOOL_CALLS]",),
)

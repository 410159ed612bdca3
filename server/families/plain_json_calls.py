"""Families that write calls as plain JSON: as a list behind a marker (Phi, Granite 3, Nemotron, older Mistral models),
or with no marker (Llama 3)."""

from __future__ import annotations

from server.families.family import CallSyntax, Family
from server.families.tagged_calls import THINK


def json_list(marker: str, end_marker: str = "") -> CallSyntax:
    """Calls as one JSON list between ``marker`` and ``end_marker``; "" where the answer ends with the list. A call
    alone is read too: some templates write calls one by one."""
    return CallSyntax(
        response_field={
            "open": marker,
            **({"close": end_marker} if end_marker else {}),
            "repeats": True,
            "content": "json",
        },
        trigger=marker,
        terminator=end_marker,
        section_start=f"{marker}[",
        call_start='{"name": "',
        name_args_separator='", "arguments": ',
        call_end="}",
        call_separator=", ",
        section_end=f"]{end_marker}",
    )


APRIEL = Family(
    name="apriel",
    recognised_by=("<tool_calls>[",),
    call=json_list("<tool_calls>", "</tool_calls>"),
    markers=("<tool_calls>", "</tool_calls>"),
)
"""Apriel 1.5, whose template names Hermes' tags too."""

_PHI_OPENING = r"""
{%- set castor = namespace(messages=[], calls='') -%}
{%- set declared = tools | map(attribute='function') | list | tojson if tools else none -%}
{%- if tools and (not messages or messages[0].role != 'system') -%}
{%- set castor.messages = [dict(role='system', content='', tools=declared)] -%}
{%- endif -%}
{%- for message in messages -%}
{%- set castor.calls = '' -%}
{%- for call in message.tool_calls or [] -%}
{%- set castor.calls = castor.calls + ('' if loop.first else ', ') + '{"name": "' + call.function.name
    + '", "arguments": ' + (call.function.arguments | tojson) + '}' -%}
{%- endfor -%}
{%- set written = '<|tool_call|>[' + castor.calls + ']<|/tool_call|>' if castor.calls else '' -%}
{%- set shown = declared if loop.first and message.role == 'system' else none -%}
{%- set castor.messages = castor.messages + [dict(message, content=message.content + written, tools=shown)] -%}
{%- endfor -%}
{%- set messages = castor.messages -%}
"""

PHI = Family(
    name="phi",
    recognised_by=("<|/tool_call|>",),
    incomplete=("<|tool|>", "<|/tool|>"),
    opening=_PHI_OPENING,
    call=json_list("<|tool_call|>", "<|/tool_call|>"),
    thought=THINK,
    markers=("<|tool_call|>", "<|/tool_call|>", *THINK),
)
"""Phi-4-mini, whose own template takes the functions as a part of the system message."""

NEMOTRON = Family(
    name="nemotron",
    recognised_by=("<TOOLCALL>",),
    call=json_list("<TOOLCALL>", "</TOOLCALL>"),
    thought=THINK,
    markers=("<TOOLCALL>", "</TOOLCALL>", *THINK),
)
"""Nemotron Nano 2 and Super 1.5. Nemotron 3 writes calls as Qwen's coders do."""

GRANITE = Family(
    name="granite",
    recognised_by=("<|tool_call|>",),
    call=json_list("<|tool_call|>"),
    thought=THINK,
    markers=("<|tool_call|>", *THINK),
    markup_fields={"response": {"open_pattern": r"\s*</?response>", "close_pattern": "", "repeats": True}},
)
"""Granite 3. Told to think, it writes its answer between tags."""

MISTRAL_LIST = Family(
    name="mistral-list",
    recognised_by=("[TOOL_CALLS]",),
    call=json_list("[TOOL_CALLS]"),
    markers=("[TOOL_CALLS]",),
)

LLAMA3 = Family(
    name="llama3",
    recognised_by=("<|eot_id|>", '"parameters": '),
    call=CallSyntax(
        response_field={
            "open_pattern": r'(?:\A\s{0,8}(?:<\|python_tag\|>)?|(?<=\}\s{0,4};\s{0,4}))(?=\{\s{0,8}"name"\s?:\s?")',
            "close_pattern": r'(?<=\})\s{0,4};\s{0,4}(?=\{\s{0,8}"name"\s?:\s?")',
            "repeats": True,
            "content": "json",
            "transform": {
                "type": "function",
                "function": {"name": "{content.name}", "arguments": "{content.parameters}"},
            },
        },
        trigger="",
        terminator="",
        call_start='{"name": "',
        name_args_separator='", "parameters": ',
        call_end="}",
        call_token="<|python_tag|>",
        call_separator="; ",
    ),
    markers=("<|python_tag|>",),
    end_tokens=("<|eom_id|>",),
)

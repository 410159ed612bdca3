"""Families whose models think in a channel of its own: gpt-oss and Muse, which open one for all their text, and
Gemma 4."""

from __future__ import annotations

from server.families.family import BareKeyArguments, CallSyntax, Family, TaggedArguments
from server.families.tagged_arguments import arguments_field

GPT_OSS = Family(
    name="gpt-oss",
    recognised_by=("<|channel|>",),
    call=CallSyntax(
        response_field={
            "open_pattern": r"(?:<\|start\|>assistant)?(?:<\|channel\|>commentary)? ?to=functions\.(?P<name>[^\s<]+)"
            r"(?:<\|channel\|>commentary)?[^<\n]{0,32}(?:<\|constrain\|>\w+)?\s?<\|message\|>",
            "close_pattern": r"<\|call\|>|(?=<\|start\|>)",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        trigger="<|channel|>commentary to=",
        terminator="",
        call_start="<|channel|>commentary to=functions.",
        name_args_separator=" <|constrain|>json<|message|>",
        call_end="",
        is_parallel=False,
    ),
    thought=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    markers=("<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>", "<|return|>"),
    end_tokens=("<|return|>", "<|call|>"),
    answer_header="<|channel|>final<|message|>",
    content={"close_pattern": r"<\|end\|>|<\|return\|>", "content": "text", "content_args": {"strip": False}},
    markup_fields={
        "header": {
            "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary)\s*"
            r"(?:<\|constrain\|>\w+\s*)?<\|message\|>",
            "close_pattern": "",
            "repeats": True,
        }
    },
    reasoning_key="thinking",
)

GEMMA4 = Family(
    name="gemma4",
    recognised_by=("<|tool_call>",),
    call=CallSyntax(
        response_field={
            "open_pattern": r"\s*<\|tool_call>call:(?P<name>[^{]+)",
            "close": "<tool_call|>",
            "repeats": True,
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        trigger="<|tool_call>",
        terminator="<tool_call|>",
        call_start="<|tool_call>call:",
        name_args_separator="",
        call_end="<tool_call|>",
        call_separator="",
        arguments=BareKeyArguments(quote='<|"|>'),
    ),
    thought=("<|channel>thought\n", "<channel|>"),
    markers=("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'),
)

MUSE = Family(
    name="muse",
    recognised_by=("<atem:invoke",),
    call=CallSyntax(
        response_field=arguments_field(
            r"(?:<\|start\|>assistant)?[ ]?to=(?!self<)[^\s<]+<\|message\|>\s*<atem:function_calls>",
            "</atem:function_calls>",
            r"<atem:parameter name=\"(?P<key>[^\"]+)\">(?P<value>.*?)</atem:parameter>",
        ),
        # Models may name a function twice, as if it were in a namespace of its own name.
        calls_within=r"<atem:invoke name=\"(?P<name>[^\"]+?)(?:\.(?P=name))?\">(?P<body>.*?)</atem:invoke>",
        trigger=" to=",
        terminator="</atem:function_calls>",
        late_sign="<atem:function_calls>",
        call_start=" to=",
        name_args_separator='<|message|><atem:function_calls>\n<atem:invoke name="{name}">\n',
        call_end="</atem:invoke>\n</atem:function_calls>",
        call_separator="<|eom|><|start|>assistant",
        arguments=TaggedArguments(start='<atem:parameter name="{name}">', end="</atem:parameter>\n"),
    ),
    thought=(" to=self<|message|>", "<|eom|><|start|>assistant"),
    markers=("<|start|>", "<|message|>", "<|eom|>", "<|eot|>"),
    end_tokens=("<|eot|>",),
    answer_header=" to=user<|message|>",
    efforts=("low", "medium", "high", "xhigh"),
    content={"close_pattern": r"<\|eom\|>|<\|eot\|>", "content": "text", "content_args": {"strip": False}},
    markup_fields={
        "header": {
            "open_pattern": r"<\|start\|>assistant(?:[ ]?(?:to=user)?<\|message\|>)?"
            r"|[ ]?to=user<\|message\|>|<\|message\|>",
            "close_pattern": "",
            "repeats": True,
        }
    },
)
"""Muse Glimmer."""

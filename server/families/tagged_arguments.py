"""Families that write each argument of a call between tags of its own: Qwen's XML, GLM, MiniMax and Seed-OSS."""

from __future__ import annotations

from typing import Any

from server.families.family import CallSyntax, Family, TaggedArguments
from server.families.tagged_calls import THINK

_CALL_TAGS = ("<tool_call>", "</tool_call>")


def arguments_field(open_pattern: str, close_pattern: str, argument: str) -> dict[str, Any]:
    """Reads calls: ``argument`` matches a ``key`` and its ``value``. The ``name`` stands in the first marker, or in
    `CallSyntax.calls_within`."""
    return {
        "open_pattern": open_pattern,
        "close_pattern": close_pattern,
        "repeats": True,
        "content": "xml-inline",
        "content_args": {"tag_pattern": argument},
        "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
    }


QWEN_XML = Family(
    name="qwen-xml",
    recognised_by=("<function=", "<parameter="),
    call=CallSyntax(
        response_field=arguments_field(
            r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            r"</function>\s*</tool_call>",
            r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>",
        ),
        trigger="<tool_call>",
        terminator="</tool_call>",
        call_start="<tool_call>\n<function=",
        name_args_separator=">\n",
        call_end="</function>\n</tool_call>",
        arguments=TaggedArguments(start="<parameter={name}>\n", end="\n</parameter>\n"),
    ),
    thought=THINK,
    markers=(*_CALL_TAGS, *THINK),
)
"""Qwen3-Coder, Qwen 3.5, Nemotron 3 and others."""


def _glm(name: str, recognised_by: tuple[str, ...], gap: str) -> Family:
    """``gap`` is the white space between tags; the first tag after the name has none before it in any generation."""
    return Family(
        name=name,
        recognised_by=recognised_by,
        call=CallSyntax(
            response_field=arguments_field(
                r"\s*<tool_call>\s*(?P<name>[^<{\n]+?)\s*(?=<arg_key>|</tool_call>)",
                "</tool_call>",
                r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
            ),
            trigger="<tool_call>",
            terminator="</tool_call>",
            call_start="<tool_call>",
            name_args_separator=gap,
            call_end="</tool_call>",
            call_separator=gap,
            arguments=TaggedArguments(start=f"<arg_key>{{name}}</arg_key>{gap}<arg_value>", end=f"</arg_value>{gap}"),
        ),
        thought=THINK,
        markers=(*_CALL_TAGS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", *THINK),
        end_tokens=("<|user|>", "<|observation|>"),
    )


GLM = _glm("glm", ("<arg_key>",), "\n")
"""GLM 4.5 and 4.6."""

GLM_47 = _glm("glm-4.7", ("</arg_key><arg_value>",), "")
"""GLM 4.7, which writes no line breaks, and GLM 5."""

MINIMAX = Family(
    name="minimax-m2",
    recognised_by=("<minimax:tool_call>",),
    call=CallSyntax(
        response_field=arguments_field(
            r"\s*<minimax:tool_call>",
            "</minimax:tool_call>",
            r"<parameter name=\"(?P<key>[^\"]+)\">(?P<value>.*?)</parameter>",
        ),
        calls_within=r"<invoke name=\"(?P<name>[^\"]+)\">(?P<body>.*?)</invoke>",
        trigger="<minimax:tool_call>",
        terminator="</minimax:tool_call>",
        section_start="<minimax:tool_call>\n",
        call_start='<invoke name="',
        name_args_separator='">\n',
        call_end="</invoke>",
        section_end="\n</minimax:tool_call>",
        arguments=TaggedArguments(start='<parameter name="{name}">', end="</parameter>\n"),
    ),
    thought=THINK,
    markers=("<minimax:tool_call>", "</minimax:tool_call>", *THINK),
)

_SEED_THINK = ("<seed:think>", "</seed:think>")

SEED_OSS = Family(
    name="seed-oss",
    recognised_by=("<seed:tool_call>",),
    call=CallSyntax(
        response_field=arguments_field(
            r"\s*<seed:tool_call>\s*<function=(?P<name>[^>\n]+)>",
            r"</function>\s*</seed:tool_call>",
            r"<parameter=(?P<key>[^>\n]+)>(?P<value>.*?)</parameter>",
        ),
        trigger="<seed:tool_call>",
        terminator="</seed:tool_call>",
        call_start="<seed:tool_call>\n<function=",
        name_args_separator=">\n",
        call_end="</function>\n</seed:tool_call>",
        arguments=TaggedArguments(start="<parameter={name}>", end="</parameter>\n"),
    ),
    thought=_SEED_THINK,
    markers=("<seed:tool_call>", "</seed:tool_call>", *_SEED_THINK),
    end_tokens=("<seed:eos>",),
)

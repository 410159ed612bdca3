"""Families that write a call as JSON between ``<tool_call>`` tags: Hermes and its many heirs, and Castor itself.

Castor's own family takes every model that no other family recognises, and every one whose template cannot show
functions: a prompt asks it to write calls as Hermes does.
"""

from __future__ import annotations

from dataclasses import replace

from server.families.family import CallSyntax, Family

THINK = ("<think>", "</think>")
"""The texts around thoughts in most families that think."""

_MARKERS = ("<tool_call>", "</tool_call>", *THINK)

_JSON_IN_TAGS = CallSyntax(
    response_field={
        "open_pattern": r"\s*<tool_call>",
        "close": "</tool_call>",
        "repeats": True,
        "content": "json",
        "transform": {"type": "function", "function": "{content}"},
    },
    trigger="<tool_call>",
    terminator="</tool_call>",
    call_start='<tool_call>\n{"name": "',
    name_args_separator='", "arguments": ',
    call_end="}\n</tool_call>",
)

CASTOR = Family(
    name="castor",
    recognised_by=(),
    # Models that never learned to call repeat the same call until they are stopped.
    call=replace(_JSON_IN_TAGS, keeps_duplicates=False),
    thought=THINK,
    markers=_MARKERS,
    renders_tools=False,
)

CASTOR_PROMPT = """You can call these functions:
FUNCTIONS

To call a function, answer with its name and arguments as JSON, in this form:
<tool_call>
{"name": "function_name", "arguments": {"argument": "value"}}
</tool_call>
If no function helps, answer the user in plain words."""
"""Declares functions to models whose templates cannot; ``FUNCTIONS`` is replaced by these. Short, because small models
lose a long one."""

HERMES = Family(
    name="hermes",
    recognised_by=("<tool_call>",),
    call=_JSON_IN_TAGS,
    thought=THINK,
    markers=_MARKERS,
)
"""What Hermes, and Qwen 2.5 and 3 learned."""

GRANITE4 = replace(HERMES, name="granite4", recognised_by=("<|start_of_role|>", "<tool_call>"))

SMOLLM3 = replace(HERMES, name="smollm3", recognised_by=("Reasoning Mode: ",))

EXAONE4 = replace(HERMES, name="exaone4", recognised_by=("[|endofturn|]", "<tool_call>"), end_tokens=("[|endofturn|]",))

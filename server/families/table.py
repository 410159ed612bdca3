"""All families, and which of them a chat template belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from server.families.channels import GEMMA4, GPT_OSS
from server.families.deepseek import DEEPSEEK, DEEPSEEK_R1
from server.families.family import Family
from server.families.mistral import MISTRAL, MISTRAL_LIST
from server.families.plain_json_calls import GRANITE, LLAMA3, PHI
from server.families.tagged_calls import CASTOR, HERMES, QWEN_XML

FAMILIES = (
    GPT_OSS,
    GEMMA4,
    QWEN_XML,
    DEEPSEEK_R1,
    DEEPSEEK,
    MISTRAL,
    MISTRAL_LIST,
    PHI,
    GRANITE,
    HERMES,
    LLAMA3,
)
"""A template belongs to the first that recognises it: those with rare signs come before those whose signs several
families share."""

_THINKING_SWITCHES = {"enable_thinking": r"\benable_thinking\b", "thinking": r"(?<![\w.])thinking is (?:not )?defined"}
"""Variables of templates that turn thinking on or off, and how a template shows that it has them."""


def family_of(
    chat_template: str, renders_tools: bool = True, response_template: Mapping[str, Any] | None = None
) -> Family:
    """The family that a chat template belongs to.

    ``renders_tools`` says whether the template shows declared functions to the model; where it does not, calls are
    written as Castor's own prompt asks. ``response_template`` is the tokenizer's own, and wins for reading.
    A model thinks where its template knows the markers of thoughts.
    """
    found = next((family for family in FAMILIES if all(text in chat_template for text in family.recognised_by)), CASTOR)
    thinks = found.thought is not None and any(marker.strip() in chat_template for marker in found.thought)
    if not renders_tools:
        found = replace(found, call=CASTOR.call, markers=(*found.markers, *CASTOR.markers), renders_tools=False)
    own_fields = dict(response_template["fields"]) if response_template and renders_tools else None
    if not thinks:
        return replace(found, thought=None, own_fields=own_fields)
    switch = next((name for name, use in _THINKING_SWITCHES.items() if re.search(use, chat_template)), None)
    effort = "reasoning_effort" if "reasoning_effort" in chat_template else None
    return replace(found, thinking_switch=switch, effort_switch=effort, own_fields=own_fields)

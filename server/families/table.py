"""All families, and which of them a chat template belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from server.families.channels import GEMMA4, GPT_OSS, MUSE
from server.families.family import Family
from server.families.plain_json_calls import APRIEL, GRANITE, LLAMA3, MISTRAL_LIST, NEMOTRON, PHI
from server.families.python_calls import LFM2
from server.families.tagged_arguments import GLM, GLM_47, MINIMAX, QWEN_XML, SEED_OSS
from server.families.tagged_calls import CASTOR, EXAONE4, GRANITE4, HERMES, SMOLLM3
from server.families.token_calls import DEEPSEEK, DEEPSEEK_R1, KIMI, MISTRAL

FAMILIES = (
    GPT_OSS,
    GEMMA4,
    MUSE,
    MINIMAX,
    SEED_OSS,
    QWEN_XML,
    GLM_47,
    GLM,
    KIMI,
    LFM2,
    DEEPSEEK_R1,
    DEEPSEEK,
    MISTRAL,
    MISTRAL_LIST,
    NEMOTRON,
    APRIEL,
    PHI,
    GRANITE,
    GRANITE4,
    EXAONE4,
    SMOLLM3,
    HERMES,
    LLAMA3,
)
"""A template belongs to the first that recognises it: those with rare signs come before those whose signs several
families share."""

THINKING_SWITCHES = ("enable_thinking", "thinking")
"""Variables that turn thinking on or off in some templates."""
EFFORT_SWITCHES = ("reasoning_effort", "reasoning_strength")
"""Variables that say in some templates how hard to think."""
BUDGET_SWITCHES = ("thinking_budget",)
"""Variables that say in some templates how many tokens thoughts may have."""
NO_THINK_WORD = "/no_think"
"""The word that turns thinking off where a template looks for it in the system message."""


def completed(chat_template: str) -> str:
    """A chat template that shows calls, where one of a known family does not."""
    for family in FAMILIES:
        is_whole = not family.opening or all(text in chat_template for text in family.recognised_by)
        if not is_whole and all(text in chat_template for text in family.incomplete):
            return family.opening + chat_template
    return chat_template


def family_of(
    chat_template: str, renders_tools: bool = True, response_template: Mapping[str, Any] | None = None
) -> Family:
    """The family that a chat template belongs to, without the switches of its thinking.

    ``renders_tools`` says whether the template shows declared functions to the model; where it does not, calls are
    written as Castor's own prompt asks. ``response_template`` is the tokenizer's own, and wins for reading.
    A model thinks where its template knows the markers of thoughts.
    """
    found = next((family for family in FAMILIES if all(text in chat_template for text in family.recognised_by)), CASTOR)
    thinks = found.thought is not None and any(marker.strip() in chat_template for marker in found.thought)
    if not renders_tools:
        found = replace(found, call=CASTOR.call, markers=(*found.markers, *CASTOR.markers), renders_tools=False)
    own_fields = dict(response_template["fields"]) if response_template and renders_tools else None
    return replace(found, thought=found.thought if thinks else None, own_fields=own_fields)

"""thinkingConfig: whether a model thinks, for how long, and which tokens enclose its thoughts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.api.sampling import Thinking
from server.config.models_file import ModelSpec
from server.convert.chat_tokenizer import ChatTokenizer
from server.errors import InvalidArgument
from server.families.family import Family
from server.wire.generation import GenerationConfig, ThinkingConfig

FREE = -1
"""The budget that leaves the amount of thinking to the model."""

_EFFORTS = {
    "MINIMAL": ("low",),
    "LOW": ("low",),
    "MEDIUM": ("medium",),
    "HIGH": ("high",),
    "XHIGH": ("xhigh", "high"),
}
"""What a level is for templates that take an effort: the first that the family knows."""
_TAIL_TOKENS = 16
_NO_CONFIG = ThinkingConfig()


def thinking_for(
    config: GenerationConfig, family: Family, spec: ModelSpec, tokenizer: ChatTokenizer
) -> tuple[Mapping[str, Any], Thinking | None]:
    """The template's options, and the bounds of thoughts for the engine; None where the model cannot think.

    Budget 0 switches thinking off in the template; where a word in the system message does that, the caller writes it.
    If a model thinks anyway, its thoughts end at once. A level sets the budget. Budget and level are passed to
    templates that take them.
    Raises ``InvalidArgument`` where budget and level are both given.
    """
    wanted = config.thinking_config or _NO_CONFIG
    budget = FREE if wanted.thinking_budget is None else wanted.thinking_budget
    if wanted.thinking_level is not None:
        if wanted.thinking_budget is not None:
            raise InvalidArgument.at(
                "generation_config.thinking_config", "Set only one of thinking budget and thinking level."
            )
        budget = getattr(spec.thinking_levels, wanted.thinking_level.lower())
    if tokenizer.thought_ids is None:
        return {}, None
    start, end = tokenizer.thought_ids
    options: dict[str, Any] = {family.thinking_switch: budget != 0} if family.thinking_switch else {}
    if family.budget_switch:
        options[family.budget_switch] = budget
    efforts = _EFFORTS.get(wanted.thinking_level or "", ()) if budget else _EFFORTS["LOW"]
    if family.effort_switch and efforts:
        options[family.effort_switch] = next(effort for effort in efforts if effort in family.efforts)
    return options, Thinking(start, end, budget=None if budget == FREE else budget)


def with_open_thought(thinking: Thinking | None, prompt: Sequence[int], tokenizer: ChatTokenizer) -> Thinking | None:
    """``thinking`` at the end of this prompt: some templates already write the start of the thoughts."""
    family = tokenizer.family
    if thinking is None or family.thought is None:
        return thinking
    tail = "".join(map(tokenizer.token_text, prompt[-max(_TAIL_TOKENS, 2 * len(thinking.start)) :]))
    return replace(thinking, open=tail.rstrip().endswith(family.thought[0].rstrip()))

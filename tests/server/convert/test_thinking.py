"""thinkingConfig, over the templates of real families."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from support.templates import template_folder

from engine.api.sampling import Thinking
from server.config.models_file import ModelSpec, ThinkingLevels
from server.convert.chat_tokenizer import ChatTokenizer
from server.convert.rendering import ChatMessage, TemplateInput
from server.convert.thinking import thinking_for, with_open_thought
from server.errors import InvalidArgument
from server.wire.generation import GenerationConfig
from server.wire.message import parse

SPEC = ModelSpec("m", "/m", thinking_levels=ThinkingLevels(low=77, xhigh=-1, minimal=0))
HELLO = [ChatMessage(role="user", content="Think: <think>\n")]


@cache
def tokenizer(name: str) -> ChatTokenizer:
    return ChatTokenizer(template_folder(Path(mkdtemp()) / name, name))


def read(name: str, spec: ModelSpec = SPEC, **thinking: Any) -> tuple[Mapping[str, Any], Thinking | None]:
    config = parse(GenerationConfig, {"thinkingConfig": thinking} if thinking else {})
    chat = tokenizer(name)
    return thinking_for(config, chat.family, spec, chat)


async def rendered(name: str, **thinking: Any) -> tuple[str, Thinking | None]:
    chat = tokenizer(name)
    options, bounds = read(name, **thinking)
    ids = await chat.render(TemplateInput(HELLO, options=options))
    return "".join(map(chat.token_text, ids)), with_open_thought(bounds, ids, chat)


@pytest.mark.parametrize(
    ("thinking", "budget"),
    [
        ({}, None),
        ({"includeThoughts": True}, None),
        ({"thinkingBudget": -1}, None),
        ({"thinkingBudget": 0}, 0),
        ({"thinkingBudget": 9000}, 9000),
        ({"thinkingLevel": "LOW"}, 77),
        ({"thinkingLevel": "medium"}, 4096),
        ({"thinkingLevel": "XHIGH"}, None),
        ({"thinkingLevel": "minimal"}, 0),
        ({"thinkingLevel": "THINKING_LEVEL_UNSPECIFIED", "thinkingBudget": 5}, 5),
    ],
)
def test_budgets(thinking: dict[str, Any], budget: int | None) -> None:
    options, bounds = read("Qwen3-0.6B", **thinking)
    assert bounds is not None
    assert bounds.budget == budget
    assert options == {"enable_thinking": budget != 0}
    assert (len(bounds.start), len(bounds.end)) == (1, 1)


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen2.5"])
def test_level_and_budget_exclude_each_other(name: str) -> None:
    with pytest.raises(InvalidArgument, match="only one of thinking budget and thinking level"):
        read(name, thinkingLevel="LOW", thinkingBudget=0)


@pytest.mark.parametrize("name", ["Qwen2.5", "Nemo", "llama3"])
def test_a_model_that_does_not_think(name: str) -> None:
    assert read(name, includeThoughts=True) == ({}, None)


@pytest.mark.parametrize("budget", [-2, 2**31, 1.5, "many"])
def test_a_budget_out_of_range_is_refused(budget: Any) -> None:
    with pytest.raises(InvalidArgument, match="thinking_budget"):
        read("Qwen3-0.6B", thinkingBudget=budget)


@pytest.mark.parametrize(
    ("name", "on", "off"),
    [
        ("Qwen3-0.6B", "<|im_start|>assistant\n", "<think>\n\n</think>\n\n"),
        ("Qwen3.5", "<|im_start|>assistant\n<think>\n", "<think>\n\n</think>\n\n"),
        ("SmolLM3", "<|im_start|>assistant\n", "<think>\n\n</think>\n"),
        ("DeepSeek-R1", "<｜Assistant｜><think>\n", "<think>\n</think>"),
        ("DeepSeek-V3.1", "<｜Assistant｜><think>", "<think></think>"),
        ("gpt-oss", "<|start|>assistant", "<|start|>assistant"),
        ("Ministral-3", "[/INST]", "[/INST]"),
    ],
)
async def test_the_template_switches_thinking(name: str, on: str, off: str) -> None:
    text, bounds = await rendered(name)
    assert text.endswith(on)
    assert bounds is not None
    assert bounds.open == ("<think>" in on)
    text, bounds = await rendered(name, thinkingBudget=0)
    assert text.endswith(off)
    assert bounds is not None
    assert (bounds.open, bounds.budget) == (False, 0)


@pytest.mark.parametrize(
    ("thinking", "effort"),
    [
        ({}, "medium"),
        ({"thinkingLevel": "HIGH"}, "high"),
        ({"thinkingLevel": "LOW"}, "low"),
        ({"thinkingBudget": 0}, "low"),
    ],
)
async def test_the_template_is_told_the_effort(thinking: dict[str, Any], effort: str) -> None:
    text, _ = await rendered("gpt-oss", **thinking)
    assert f"Reasoning: {effort}\n" in text


async def test_thoughts_are_not_begun_by_what_the_user_says() -> None:
    chat = tokenizer("Qwen3-0.6B")
    _, bounds = read("Qwen3-0.6B")
    ids = await chat.render(TemplateInput([ChatMessage(role="user", content="<think>")]))
    opened = with_open_thought(bounds, ids, chat)
    assert opened is not None
    assert not opened.open
    assert with_open_thought(None, ids, chat) is None

"""thinkingConfig, over the templates of the families."""

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
from server.convert.prompt import conversation
from server.convert.rendering import ChatMessage, TemplateInput
from server.convert.thinking import thinking_for, with_open_thought
from server.errors import InvalidArgument
from server.wire.generation import GenerationConfig
from server.wire.message import parse
from server.wire.requests import GenerateContentRequest

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


@pytest.mark.parametrize("name", ["Qwen2.5", "Mistral-Nemo", "llama3"])
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
        ("DeepSeek-V3.1", "<｜Assistant｜><think>", "<｜Assistant｜></think>"),
        ("gpt-oss", "<|start|>assistant", "<|start|>assistant"),
        ("Ministral", "[/INST]", "[/INST]"),
        ("GLM-4.6", "<|assistant|>", "\n<think></think>"),
        ("GLM-4.7", "<|assistant|><think>", "<|assistant|></think>"),
        ("EXAONE-4", "[|assistant|]\n<think>\n", "[|assistant|]\n<think>\n\n</think>\n\n"),
        ("Seed-OSS", "<seed:bos>assistant\n", "</seed:think>"),
        ("gemma-4", "<|turn>model\n", "<|channel>thought\n<channel|>"),
        ("granite-3", "<|start_of_role|>assistant<|end_of_role|>", "<|start_of_role|>assistant<|end_of_role|>"),
        ("Kimi-K2-Thinking", "<|im_assistant|>assistant<|im_middle|>", "<|im_assistant|>assistant<|im_middle|>"),
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


@pytest.mark.parametrize(
    ("name", "options"), [("Muse", {"reasoning_strength": "xhigh"}), ("gpt-oss", {"reasoning_effort": "high"})]
)
def test_the_highest_level_is_the_highest_effort_of_the_family(name: str, options: dict[str, str]) -> None:
    assert read(name, thinkingLevel="XHIGH")[0] == options


@pytest.mark.parametrize(
    ("thinking", "budget"),
    [({}, -1), ({"thinkingBudget": 700}, 700), ({"thinkingLevel": "LOW"}, 77), ({"thinkingBudget": 0}, 0)],
)
async def test_the_template_is_told_the_budget(thinking: dict[str, Any], budget: int) -> None:
    options, bounds = read("Seed-OSS", **thinking)
    assert options == {"thinking_budget": budget}
    assert bounds is not None
    assert bounds.budget == (None if budget == -1 else budget)
    text, _ = await rendered("Seed-OSS", **thinking)
    assert (f"thinking budget is {budget}" in text) == (budget >= 0)


@pytest.mark.parametrize("system", ["", "Be brief."])
async def test_a_word_in_the_system_message_turns_thinking_off(system: str) -> None:
    chat = tokenizer("Nemotron-Nano")
    instruction = {"systemInstruction": {"parts": [{"text": system}]}} if system else {}
    for thinking, end in (({}, "<think>\n"), ({"thinkingBudget": 0}, "<think></think>")):
        config = {"generationConfig": {"thinkingConfig": thinking}}
        wire = parse(GenerateContentRequest, {"contents": "Hi", **instruction, **config})
        text = "".join(map(chat.token_text, await chat.render(conversation(wire, SPEC, chat).chat)))
        assert text.endswith(f"<SPECIAL_11>Assistant\n{end}")
        assert system in text
        assert "no_think" not in text


async def test_a_template_that_always_opens_thoughts() -> None:
    for thinking, budget in (({}, None), ({"thinkingBudget": 0}, 0)):
        text, bounds = await rendered("MiniMax-M2", **thinking)
        assert text.endswith("]~b]ai\n<think>\n")
        assert bounds is not None
        assert (bounds.open, bounds.budget) == (True, budget)


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("Qwen3-0.6B", ("enable_thinking",)),
        ("DeepSeek-V3.1", ("thinking",)),
        ("gpt-oss", ("reasoning_effort",)),
        ("Muse", ("reasoning_strength",)),
        ("Seed-OSS", ("thinking_budget",)),
        ("Nemotron-Nano", ("/no_think",)),
        ("SmolLM3", ("enable_thinking",)),
        ("MiniMax-M2", ()),
        ("Qwen2.5", ()),
    ],
)
def test_switches_are_found_out_by_trying(name: str, switches: tuple[str, ...]) -> None:
    assert tokenizer(name).family.switches == switches


async def test_thoughts_are_not_begun_by_what_the_user_says() -> None:
    chat = tokenizer("Qwen3-0.6B")
    _, bounds = read("Qwen3-0.6B")
    ids = await chat.render(TemplateInput([ChatMessage(role="user", content="<think>")]))
    opened = with_open_thought(bounds, ids, chat)
    assert opened is not None
    assert not opened.open
    assert with_open_thought(None, ids, chat) is None

"""What later requests of a conversation repeat of a prompt."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.templates import template_folder
from support.tiny import save_tiny_tokenizer

from server.convert.rendering import ChatMessage, Messages, Renderer, TemplateInput

FUNCTION = {"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(template_folder(tmp_path_factory.mktemp("qwen"), "Qwen3.5"))


def shared(one: list[int], other: list[int]) -> int:
    return next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))


def ask(text: str) -> ChatMessage:
    return {"role": "user", "content": text}


def answer(text: str, thought: str) -> ChatMessage:
    return {"role": "assistant", "content": text, "reasoning_content": thought}


def call(place: str) -> ChatMessage:
    function: dict[str, Any] = {"name": "look", "arguments": {"at": place}}
    calls = [{"id": "callabcde", "type": "function", "function": function}]
    return {"role": "assistant", "content": "", "reasoning_content": f"where is {place}?", "tool_calls": calls}


def result(text: str) -> ChatMessage:
    return {"role": "tool", "content": text, "name": "look", "tool_call_id": "callabcde"}


def prompts(renderer: Renderer, turns: list[Messages], **more: Any) -> list[tuple[list[int], tuple[int, ...]]]:
    """The prompt of each request of a conversation, which adds some messages to the one before, and its points."""
    found, history = [], []
    for turn in turns:
        history = [*history, *turn]
        chat = TemplateInput(history, **more)
        ids = renderer.ids(chat)
        found.append((ids, renderer.resume_points(chat, ids)))
    return found


def test_ten_turns_with_thoughts_repeat_what_was_foretold(qwen: Renderer) -> None:
    turns: list[Messages] = [[ask("Hello")]]
    turns += [[answer(f"Answer {n}.", f"thought {n}"), ask(f"And {n}?")] for n in range(9)]
    for (before, points), (now, _) in pairwise(prompts(qwen, turns)):
        assert points == (shared(before, now),)
        assert len(before) - 6 <= points[0] < len(before), "all but what opens the thoughts of the answer"


def test_without_thoughts_the_whole_prompt_but_the_opening_is_repeated(qwen: Renderer) -> None:
    turns: list[Messages] = [[ask("Hello")], [{"role": "assistant", "content": "Hi."}, ask("And now?")]]
    (before, points), (now, _) = prompts(qwen, turns, options={"enable_thinking": False})
    assert points == (shared(before, now),)


def test_calls_and_questions_go_on_at_different_points(qwen: Renderer) -> None:
    """Thoughts before calls are shown until the next question."""
    loop: list[Messages] = [[ask("Where?")], [call("here"), result("no")], [call("there"), result("yes")]]
    (_, _), (before, points), (called, later) = prompts(qwen, loop, tools=[FUNCTION])
    assert shared(before, called) == max(points)
    asked = prompts(qwen, [*loop, [answer("There.", "good"), ask("Sure?")]], tools=[FUNCTION])[-1][0]
    assert shared(called, asked) == min(later)
    assert len(later) > 1


def test_without_a_template_everything_is_repeated(tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    renderer = Renderer(tmp_path)
    chat = TemplateInput([ask("Once upon a time")])
    ids = renderer.ids(chat)
    assert renderer.resume_points(chat, ids) == (len(ids),)


def test_a_template_that_takes_no_next_turn_foretells_nothing(tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    one = "{% if messages | length > 1 %}{{ raise_exception('one question only') }}{% endif %}{{ messages[0].content }}"
    (tmp_path / "chat_template.jinja").write_text(one)
    renderer = Renderer(tmp_path)
    chat = TemplateInput([ask("Hello")])
    assert renderer.resume_points(chat, renderer.ids(chat)) == ()

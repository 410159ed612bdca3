"""Answers to a schema in the words of gpt-oss, whose models open a channel before they answer: the real engine with a
random model, and what the mapper makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.templates import template_folder
from support.tiny import EOS_ID, tiny_model_folder

from engine.api.engine import EngineConfig
from engine.api.events import FinishReason
from engine.api.requests import Request
from engine.api.sampling import SamplingParams, Thinking
from engine.build import build_core
from engine.core.core import Core
from server.convert.chat_tokenizer import ChatTokenizer
from server.convert.sampling import answer_syntax
from server.grammar.compiler import GrammarCompiler
from server.grammar.tool_calls import with_answer_header
from server.mapper.parts import Text, Thought, answer_parser
from server.wire.generation import GenerationConfig
from server.wire.message import parse

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["n"]}
HEADER = "<|channel|>final<|message|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt-oss")
    config = (tiny_model_folder(path, num_hidden_layers=1, max_position_embeddings=512) / "config.json").read_bytes()
    template_folder(path, "gpt-oss")
    (path / "config.json").write_bytes(config)
    return path


@pytest.fixture(scope="module")
def core(folder: Path) -> Iterator[Core]:
    built = build_core(EngineConfig(str(folder), device="cpu", threads=1), lambda *_: None)
    yield built
    built.check()
    built.close()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ChatTokenizer:
    return ChatTokenizer(folder)


async def answered(
    core: Core, tokenizer: ChatTokenizer, config: dict[str, Any], seed: int, budget: int | None = 8
) -> tuple[str, list[Any], FinishReason]:
    """The text of one answer, its parts, and why it ended."""
    family = tokenizer.family
    assert (family.name, tokenizer.thought_ids is not None) == ("gpt-oss", True)
    compiler = GrammarCompiler(seconds=60.0)
    grammar = await compiler.answer(parse(GenerationConfig, config))
    await compiler.close()
    assert grammar is not None
    start, end = tokenizer.thought_ids
    sampling = SamplingParams(300, seed=seed, stop_ids=(EOS_ID,), stop=tuple(config.get("stopSequences", ())))
    thinking = Thinking(start, end, budget=budget)
    written = with_answer_header(grammar.text, family, tokenizer.atom_ids)
    sampling = answer_syntax(sampling, tokenizer, False, thinking, written)
    core.submit(Request("one", prompt=(10, 11, 12), sampling=sampling))
    text, reason = "", None
    while core.has_work:
        for events in core.step():
            assert events.done is None or events.done.error is None, events.done
            text += "".join(delta.text for delta in events.deltas)
            reason = events.finished[0].reason if events.finished else reason
    parser = answer_parser(family, constrained=True)()
    return text, [*parser.feed(text), *parser.flush(reason)], reason


@pytest.mark.parametrize("seed", range(12))
async def test_the_header_comes_first_and_is_not_shown(core: Core, tokenizer: ChatTokenizer, seed: int) -> None:
    config = {"responseMimeType": "application/json", "responseJsonSchema": SCHEMA}
    text, parts, reason = await answered(core, tokenizer, config, seed)
    assert reason is FinishReason.STOP
    assert text.count(HEADER) == 1, text
    said = "".join(part.text for part in parts if isinstance(part, Text))
    assert 0 <= json.loads(said)["n"] <= 99
    assert text.endswith(HEADER + said)
    thought = text.startswith("<|channel|>analysis")
    assert any(isinstance(part, Thought) for part in parts) <= thought
    if thought:
        assert f"<|end|><|start|>assistant{HEADER}" in text


async def test_some_answers_are_thought_about_and_some_are_not(core: Core, tokenizer: ChatTokenizer) -> None:
    config = {"responseMimeType": "application/json", "responseJsonSchema": SCHEMA}
    texts = [(await answered(core, tokenizer, config, seed))[0] for seed in range(40)]
    assert {text.startswith("<|channel|>analysis") for text in texts} == {True, False}


async def test_an_enum(core: Core, tokenizer: ChatTokenizer) -> None:
    config = {"responseMimeType": "text/x.enum", "responseSchema": {"type": "STRING", "enum": ["red", "blue"]}}
    for seed in range(4):
        text, parts, _ = await answered(core, tokenizer, config, seed)
        assert text.endswith((f"{HEADER}red", f"{HEADER}blue"))
        assert "".join(part.text for part in parts if isinstance(part, Text)) in ("red", "blue")


async def test_stop_sequences_do_not_see_the_header(core: Core, tokenizer: ChatTokenizer) -> None:
    config = {
        "responseMimeType": "application/json",
        "responseJsonSchema": SCHEMA,
        "stopSequences": ["final", "message"],
    }
    text, parts, reason = await answered(core, tokenizer, config, 1)
    assert reason is FinishReason.STOP
    assert json.loads("".join(part.text for part in parts if isinstance(part, Text))), text

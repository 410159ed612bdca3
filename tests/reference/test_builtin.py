"""The built-in model through the whole core: its text and logprobs equal what transformers computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paged import plain_logits, plain_model
from tokenizers import Tokenizer
from transformers import RepetitionPenaltyLogitsProcessor

from engine.api.engine import EngineConfig
from engine.api.events import Delta, Event, RequestFinished
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.build import build_core
from engine.core.core import Core

# One worker takes all of them: what they compare with takes half a minute to compute.
pytestmark = [pytest.mark.reference, pytest.mark.timeout(900), pytest.mark.xdist_group("builtin")]

NEW_TOKENS = 12
END = 2
TIE = 1e-4
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Write a haiku about rain.",
    "How many legs does a spider have?",
    "Translate 'good morning' to Spanish.",
    "What is 2 + 2?",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "Explain gravity to a child.",
    "List the planets.",
    "What does HTTP stand for?",
    "Tell me a joke.",
    "Why is the sky blue?",
    "What is photosynthesis?",
    "Complete: roses are red,",
    "Name a famous painter.",
    "What is the boiling point of water?",
    "Say hello.",
    "Define recursion.",
    "What is the largest ocean?",
)


@pytest.fixture(scope="module")
def core(builtin_model: Path) -> Iterator[Core]:
    config = EngineConfig(path=str(builtin_model), device="cpu", dtype="float32", kv_memory=2e8, threads=1)
    with closing(build_core(config, lambda stage, done: None)) as core:
        yield core


@pytest.fixture(scope="module")
def plain(builtin_model: Path) -> Any:
    return plain_model(builtin_model)


@pytest.fixture(scope="module")
def prompts(builtin_model: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(builtin_model / "tokenizer.json"))
    turns = (f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS)
    return [tokenizer.encode(turn).ids for turn in turns]


@pytest.fixture(scope="module")
def generated(plain: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [_generate(plain, prompt) for prompt in prompts]


def _generate(plain: Any, prompt: list[int], **settings: Any) -> list[int]:
    """What ``model.generate`` answers, without the end token."""
    settings |= {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": END, "use_cache": True}
    out = plain.generate(torch.tensor([prompt]), **settings)
    return [token for token in out[0, len(prompt) :].tolist() if token != END]


def _serve(core: Core, requests: list[Request]) -> dict[str, list[Event]]:
    events: dict[str, list[Event]] = {request.id: [] for request in requests}
    for request in requests:
        core.submit(request)
    while core.has_work:
        for told in core.step():
            events[told.request_id] += told
    core.check()
    for seen in events.values():
        assert isinstance(seen[-1], RequestFinished)
        assert seen[-1].error is None
    return events


def _requests(prompts: list[list[int]], **sampling: Any) -> list[Request]:
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, stop_ids=(END,), **sampling)
    # Salted, so that no run reads the pages of another.
    return [Request(f"r{i}", tuple(prompt), params, salt=f"{len(prompts)}-{i}") for i, prompt in enumerate(prompts)]


def _tokens(events: list[Event]) -> list[int]:
    return [token for event in events if isinstance(event, Delta) for token in event.token_ids]


def _assert_same(plain: Any, prompt: list[int], found: list[int], expected: list[int], penalty: float = 1.0) -> None:
    """Equal token for token, up to the first step where the two leading logits are as good as equal."""
    if found == expected:
        return
    step = next(i for i, (a, b) in enumerate(zip([*found, END], [*expected, END], strict=False)) if a != b)
    before = prompt + expected[:step]
    scores = plain_logits(plain, before)[-1:]
    best = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([before]), scores)[0].topk(2).values
    assert best[0] - best[1] < TIE, f"step {step}: {found} instead of {expected}"


def test_greedy_text_equals_generate_alone(
    core: Core, plain: Any, prompts: list[list[int]], generated: list[list[int]]
) -> None:
    for prompt, expected in zip(prompts, generated, strict=True):
        found = _tokens(_serve(core, _requests([prompt]))["r0"])
        _assert_same(plain, prompt, found, expected)


def test_greedy_text_equals_generate_in_one_batch(
    core: Core, plain: Any, prompts: list[list[int]], generated: list[list[int]]
) -> None:
    events = _serve(core, _requests(prompts))
    for i, (prompt, expected) in enumerate(zip(prompts, generated, strict=True)):
        _assert_same(plain, prompt, _tokens(events[f"r{i}"]), expected)


def test_a_repetition_penalty_equals_that_of_generate(
    core: Core, plain: Any, prompts: list[list[int]], generated: list[list[int]]
) -> None:
    chosen = prompts[:3]
    events = _serve(core, _requests(chosen, repetition_penalty=1.3))
    penalised = [_generate(plain, prompt, repetition_penalty=1.3) for prompt in chosen]
    assert penalised != generated[:3]
    for i, (prompt, expected) in enumerate(zip(chosen, penalised, strict=True)):
        _assert_same(plain, prompt, _tokens(events[f"r{i}"]), expected, penalty=1.3)


def test_logprobs_equal_a_plain_forward(core: Core, plain: Any, prompts: list[list[int]]) -> None:
    chosen = prompts[:3]
    events = _serve(core, _requests(chosen, logprobs=5))
    for i, prompt in enumerate(chosen):
        deltas = [event for event in events[f"r{i}"] if isinstance(event, Delta)]
        tokens = _tokens(events[f"r{i}"])
        reports = [report for delta in deltas for report in delta.logprobs]
        assert len(reports) == len(tokens) > 0
        raw = plain_logits(plain, prompt + tokens)[len(prompt) - 1 :].log_softmax(-1)
        for row, token, report in zip(raw, tokens, reports, strict=False):
            assert report.chosen == pytest.approx(row[token].item(), abs=1e-3)
            assert [top.logprob for top in report.top] == pytest.approx(row.topk(5).values.tolist(), abs=1e-3)


@pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_start|>b", "x <|im_end|>"])
def test_a_schema_can_ask_for_the_names_of_control_tokens(core: Core, prompts: list[list[int]], text: str) -> None:
    grammar = json.dumps({"grammars": [{"json_schema": {"const": text}}]})
    params = SamplingParams(60, temperature=0.0, stop_ids=(END,), grammar=grammar)
    events = _serve(core, [Request("r", tuple(prompts[0]), params)])["r"]
    assert json.loads("".join(event.text for event in events if isinstance(event, Delta))) == text

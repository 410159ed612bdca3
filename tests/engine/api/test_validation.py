"""Every number that a stranger gives is refused with field, value and limit where it is out of range."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest

from engine.api.block_groups import BlockGroup
from engine.api.engine import EngineConfig, ModelInfo
from engine.api.requests import Request
from engine.api.sampling import SamplingParams, Thinking
from engine.api.validation import refusal

INFO = ModelInfo(
    "llama", 0, "float32", "cpu", vocab_size=100, max_context=8, block_size=4, groups=(BlockGroup(4),), max_running=2
)
CONFIG = EngineConfig(path="", max_running=2, max_waiting=3)
GOOD = Request("r", (0, 99), SamplingParams(max_tokens=1))


def refuse(**changes: Any) -> str | None:
    fields = {"prompt", "candidates", "deadline"}
    sampling = replace(GOOD.sampling, **{name: value for name, value in changes.items() if name not in fields})
    request = replace(GOOD, sampling=sampling, **{name: changes[name] for name in fields & changes.keys()})
    return refusal(request, INFO, CONFIG)


def test_a_model_that_holds_no_more_says_why() -> None:
    info = replace(INFO, context_limit="its rotary embedding is dynamic")
    said = refusal(replace(GOOD, prompt=(0,) * 8), info, CONFIG)
    assert said is not None
    assert "holds 8, prompt and answer together (its rotary embedding is dynamic); shorten it to at most 7" in said


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prompt": (0,) * 7},
        {"candidates": 5, "max_tokens": 10**9},
        {"temperature": 0.0, "top_p": 0.0, "top_k": 10**6, "seed": -(2**63), "logprobs": 20},
        {"temperature": 1e9, "presence_penalty": -2.0, "frequency_penalty": 2.0, "logprobs": 0},
        {"min_p": 1.0, "repetition_penalty": 0.01},
        {"stop": ("x",) * 64, "stop_ids": (1000,), "deadline": inf},
        {"stop_exempt": (("a" * 4096, "b"),) * 16, "markers": (0, 99), "grammar": "g" * 2**20},
        {"thinking": Thinking((), (99,) * 64, open=True, budget=0)},
        {"thinking": Thinking((0,) * 64, (99,), budget=10**9)},
    ],
)
def test_served(changes: dict[str, Any]) -> None:
    assert refuse(**changes) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ()}, ["prompt", "empty"]),
        ({"prompt": (0,) * 8}, ["prompt", "8 tokens", "7"]),
        ({"prompt": (1, 100, 2)}, ["prompt", "100", "99"]),
        ({"prompt": (1, -1, 200)}, ["prompt", "-1", "99"]),
        ({"candidates": 0}, ["candidates", "0", "5"]),
        ({"candidates": 6}, ["candidates", "6", "5"]),
        ({"deadline": nan}, ["deadline"]),
        ({"max_tokens": 0}, ["max_tokens", "0", "1"]),
        ({"temperature": -0.1}, ["temperature", "-0.1"]),
        ({"temperature": nan}, ["temperature", "nan"]),
        ({"temperature": inf}, ["temperature", "inf"]),
        ({"top_p": 1.1}, ["top_p", "1.1"]),
        ({"top_p": nan}, ["top_p", "nan"]),
        ({"top_k": -1}, ["top_k", "-1"]),
        ({"min_p": -0.1}, ["min_p", "-0.1", "from 0 to 1"]),
        ({"min_p": 1.5}, ["min_p", "1.5", "from 0 to 1"]),
        ({"repetition_penalty": 0.0}, ["repetition_penalty", "0.0", "above 0"]),
        ({"repetition_penalty": inf}, ["repetition_penalty", "inf", "above 0"]),
        ({"presence_penalty": nan}, ["presence_penalty", "nan"]),
        ({"frequency_penalty": -inf}, ["frequency_penalty", "-inf"]),
        ({"seed": 2**63}, ["seed", str(2**63)]),
        ({"logprobs": 21}, ["logprobs", "21", "20"]),
        ({"logprobs": -1}, ["logprobs", "-1"]),
        ({"stop": ("a", "")}, ["stop", "0 characters"]),
        ({"stop": ("a" * 4097,)}, ["stop", "4097", "4096"]),
        ({"stop": ("a",) * 65}, ["stop", "65", "64"]),
        ({"stop_exempt": (("a", ""),)}, ["stop_exempt", "0 characters"]),
        ({"stop_exempt": (("a", "b" * 4097),)}, ["stop_exempt", "4097", "4096"]),
        ({"stop_exempt": (("a", "b"),) * 17}, ["stop_exempt", "17", "16"]),
        ({"grammar": ""}, ["grammar", "0 characters"]),
        ({"grammar": "g" * (2**20 + 1)}, ["grammar", str(2**20 + 1), str(2**20)]),
        ({"markers": (1, 100)}, ["markers", "100", "99"]),
        ({"thinking": Thinking((-1,), (1,))}, ["thinking.start", "-1", "99"]),
        ({"thinking": Thinking((1,), (1, 100))}, ["thinking.end", "100", "99"]),
        ({"thinking": Thinking((1,), ())}, ["thinking.end", "empty"]),
        ({"thinking": Thinking((1,), (1,) * 65)}, ["thinking", "65", "64"]),
        ({"thinking": Thinking((1,), (1,), budget=-1)}, ["thinking.budget", "-1"]),
    ],
)
def test_refused(changes: dict[str, Any], words: list[str]) -> None:
    problem = refuse(**changes)
    assert problem is not None
    assert [word for word in words if word not in problem] == []

"""Bodies mutated at random: never our failure, always the envelope."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples
from support.fakes import Harness, serving, tokenizer_folder

VALID: dict[str, Any] = {
    "contents": [
        {"role": "user", "parts": [{"text": "hi"}, {"text": "there"}]},
        {"role": "model", "parts": [{"text": "x", "thought": True}, {"text": "y", "thoughtSignature": "ab-_"}]},
        {"role": "user", "parts": {"text": "two"}},
    ],
    "system_instruction": {"parts": [{"text": "sys"}]},
    "generationConfig": {
        "temperature": 0.5,
        "topK": 4,
        "stopSequences": ["a"],
        "thinkingConfig": {"thinkingBudget": 0},
    },
    "safetySettings": [{"category": "HARM_CATEGORY_HARASSMENT", "threshold": 4}],
    "tools": [{}],
    "labels": {"a": "b"},
}
FIELDS = """contents parts text role inlineData functionCall args systemInstruction generation_config seed logprobs
    tools store googleSearch responseSchema candidateCount foo _ maxOutputTokens stopSequences responseMimeType model"""
NAMES = st.sampled_from(FIELDS.split())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    body = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(body))
        if not places:
            break
        container, key = places[draw(st.integers(0, len(places) - 1))]
        if draw(st.booleans()) and isinstance(container, dict):
            container[draw(NAMES)] = draw(JSON)
        else:
            container[key] = draw(JSON)
    return body


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tokenizer_folder(tmp_path / "tiny")


@pytest.mark.hypothesis
def test_mutated_bodies(folder: Path) -> None:
    with asyncio.Runner() as runner:
        context = serving(folder)
        harness = runner.run(context.__aenter__())

        @settings(max_examples=examples(300))
        @given(mutated())
        def check(body: Any) -> None:
            runner.run(_post_all(harness, [json.dumps(body).encode()]))

        check()
        runner.run(context.__aexit__(None, None, None))


async def test_bytes_that_are_not_json(folder: Path) -> None:
    whole = json.dumps(VALID).encode()
    bodies = [
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b'"x"',
        b"NaN",
        b'{"contents": 1e999}',
        b'{"contents": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"contents":' + b"9" * 5000 + b"}",
        b"",
        *(whole[:cut] for cut in range(0, len(whole), 37)),
    ]
    async with serving(folder) as harness:
        assert set(await _post_all(harness, bodies)) == {400}


async def _post_all(harness: Harness, bodies: list[bytes]) -> list[int]:
    codes = []
    for body in bodies:
        for method in ("generateContent", "countTokens"):
            response = await harness.client.post(f"/v1beta/models/tiny:{method}", content=body)
            codes.append(response.status_code)
            assert response.status_code in (200, 400, 404, 501), response.text
            if response.status_code != 200:
                error = response.json()["error"]
                assert error["code"] == response.status_code
                assert isinstance(error["message"], str)
                assert isinstance(error["status"], str)
    return codes

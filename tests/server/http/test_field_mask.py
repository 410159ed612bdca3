"""Masks as Google reads them: what is left of an answer, and what is no mask."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples

from server.errors import InvalidArgument
from server.http.field_mask import MAX_CHARACTERS, MAX_DEPTH, FieldMask
from server.wire.answers import COUNT_TOKENS, EMPTY, FILE, GENERATE_CONTENT

ARGS = {"x": {"y": 1, "z": 2}, "w": [{"q": 1, "r": 2}, 3], "snake_case": 4, "snakeCase": 5}
ANSWER: dict[str, Any] = {
    "candidates": [
        {
            "content": {"parts": [{"text": "hi"}, {"functionCall": {"name": "f", "args": ARGS}}], "role": "model"},
            "finishReason": "STOP",
            "index": 0,
        },
        {"content": {"parts": [{"text": "ho"}], "role": "model"}, "index": 1},
    ],
    "usageMetadata": {"totalTokenCount": 3, "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 1}]},
    "modelVersion": "m",
}
TEXTS = {"candidates": [{"content": {"parts": [{"text": "hi"}, {}]}}, {"content": {"parts": [{"text": "ho"}]}}]}


EMPTY_PART = {"content": {"parts": [{}]}}


def call(args: Any) -> dict[str, Any]:
    return {"candidates": [{"content": {"parts": [{}, {"functionCall": {"args": args}}]}}, EMPTY_PART]}


@pytest.mark.parametrize(
    ("mask", "left"),
    [
        ("*", ANSWER),
        ("candidates(content(parts(text)))", TEXTS),
        ("candidates/content/parts/text", TEXTS),
        ("candidates.content.parts.text", TEXTS),
        ("candidates/content(parts.text)", TEXTS),
        ("modelVersion,usageMetadata/totalTokenCount", {"modelVersion": "m", "usageMetadata": {"totalTokenCount": 3}}),
        (
            "model_version, usage_metadata.total_token_count",
            {"modelVersion": "m", "usageMetadata": {"totalTokenCount": 3}},
        ),
        ("candidates(index)", {"candidates": [{"index": 0}, {"index": 1}]}),
        ("candidates(index,finishReason)", {"candidates": [{"index": 0, "finishReason": "STOP"}, {"index": 1}]}),
        ("candidates/*", {"candidates": ANSWER["candidates"]}),
        ("candidates(*),candidates/index", {"candidates": ANSWER["candidates"]}),
        ("candidates/index,candidates", {"candidates": ANSWER["candidates"]}),
        ("*/promptTokensDetails/modality", {"usageMetadata": {"promptTokensDetails": [{"modality": "TEXT"}]}}),
        ("promptFeedback", {}),
        ("candidates/content/parts/functionCall/args/x/y", call({"x": {"y": 1}})),
        ("candidates/content/parts/functionCall/args(w/q,snake_case)", call({"w": [{"q": 1}], "snake_case": 4})),
        ("candidates/content/parts/functionCall/args/x/y/deeper", call({"x": {}})),
        ("candidates/content/parts/functionCall/args/*", call(ARGS)),
    ],
)
def test_what_a_mask_leaves(mask: str, left: Any) -> None:
    assert FieldMask(mask, GENERATE_CONTENT).applied(ANSWER) == left


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ("foo", "Cannot find matching fields for path 'foo'. There are: candidates, createTime"),
        ("candidates(content,foo)", "for path 'candidates.foo'. There are: avgLogprobs"),
        ("candidates/index/deeper", "for path 'candidates.index.deeper'"),
        ("*/foo", "for path '*.foo'"),
        ("candidates/content/parts/functionCall/args/*/x", "functionCall.args.*.x'"),
        ("Candidates", "for path 'Candidates'"),
        ("candidates(", "ends too early"),
        ("candidates/", "ends too early"),
        ("candidates,", "ends too early"),
        (" ", "ends too early"),
        ("candidates(index", "unpaired parenthesis"),
        ("candidates)", "unpaired parenthesis"),
        ("candidates()", "')' stands where a name is expected"),
        ("candidates,,index", "',' stands where a name is expected"),
        ("candidates index", "'index' stands where , or the end is expected"),
        ("candidates(index)index", "'index' stands where"),
        ("candidates(index)/index", "'/' stands where"),
        ("candidates(index)(index)", "'(' stands where"),
        ("/candidates", "'/' stands where a name is expected"),
        ("a/" * MAX_DEPTH + "a", f"at most {MAX_DEPTH}"),
        ("a" * (MAX_CHARACTERS + 1), f"at most {MAX_CHARACTERS}"),
    ],
)
def test_what_is_no_mask_of_an_answer(mask: str, words: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        FieldMask(mask, GENERATE_CONTENT)
    assert refusal.value.message.startswith("Error expanding 'fields' parameter. ")
    assert words in refusal.value.message
    assert [violation.field for violation in refusal.value.violations] == ["fields"]
    assert len(refusal.value.message) < 1000


def test_every_message_has_its_own_fields() -> None:
    assert FieldMask("sha256_hash", FILE).applied({"sha256Hash": "x", "name": "files/a"}) == {"sha256Hash": "x"}
    assert FieldMask("*", EMPTY).applied({}) == {}
    for fields in (EMPTY, COUNT_TOKENS):
        with pytest.raises(InvalidArgument):
            FieldMask("candidates", fields)


async def test_each_answer_of_a_stream_is_masked_and_the_stream_is_closed() -> None:
    closed = []

    async def stream() -> AsyncGenerator[Any, None]:
        try:
            yield ANSWER
            yield {"modelVersion": "m"}
        finally:
            closed.append(True)

    masked = FieldMask("modelVersion", GENERATE_CONTENT).each(stream())
    assert await anext(masked) == {"modelVersion": "m"}
    await masked.aclose()
    assert closed == [True]


def paths(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every leaf."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from paths(inner, (*path, name))
    elif isinstance(value, list):
        for item in value:
            yield from paths(item, path)
    else:
        yield path


LEAVES = sorted({path for path in paths(ANSWER) if path[-1] != "w"})


@given(st.sets(st.sampled_from(LEAVES), min_size=1), st.sampled_from("/."))
@settings(max_examples=examples(100))
def test_the_leaves_that_are_named_are_those_that_are_left(chosen: set[tuple[str, ...]], separator: str) -> None:
    left = FieldMask(",".join(separator.join(path) for path in chosen), GENERATE_CONTENT).applied(ANSWER)
    assert {path for path in paths(left) if path in LEAVES} == chosen
    assert json.dumps(left)


@given(st.text("ab*,()/. ", max_size=40))
@settings(max_examples=examples(300))
def test_any_text_is_a_mask_or_a_refusal(text: str) -> None:
    with suppress(InvalidArgument):
        FieldMask(text, {"a": {"b": {}, "a": {"b": {}}}, "b": None}).applied({"a": {"b": 1}, "b": {"a": [1]}})

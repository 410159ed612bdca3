"""The table of sampling numbers agrees with the parameters that it describes."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import pytest

from engine.api.block_groups import BlockGroup
from engine.api.engine import EngineConfig, ModelInfo
from engine.api.requests import Request
from engine.api.sampling import SAMPLING_FIELDS, Range, SamplingField, SamplingParams, everything_on
from engine.api.validation import refusal

BY_THEMSELVES = {"max_tokens", "seed", "logprobs"}
INFO = ModelInfo(
    "llama", 0, "float32", "cpu", vocab_size=9, max_context=8, block_size=4, groups=(BlockGroup(4),), max_running=2
)


def test_every_number_is_in_the_table_or_has_a_rule_of_its_own() -> None:
    numbers = {field.name for field in fields(SamplingParams) if str(field.type).startswith(("int", "float"))}
    assert set(SAMPLING_FIELDS) | BY_THEMSELVES == numbers


@pytest.mark.parametrize("field", SAMPLING_FIELDS.values(), ids=lambda field: field.name)
def test_what_may_be_asked_for_is_computed(field: SamplingField) -> None:
    ends = [end for end in (field.asked.low, field.asked.high) if end is not None and end in field.asked]
    for value in [field.default, field.switched_on, *ends]:
        assert value in field.asked
        request = Request("r", (0,), replace(SamplingParams(1), **{field.name: value}))
        assert refusal(request, INFO, EngineConfig(path="")) is None


def test_everything_on_differs_from_the_defaults() -> None:
    usual, on = asdict(SamplingParams(1)), asdict(everything_on())
    assert {name for name in SAMPLING_FIELDS if usual[name] == on[name]} == {"temperature"}
    assert on["temperature"] > 0
    assert refusal(Request("r", (0,), everything_on()), INFO, EngineConfig(path="")) is None


@pytest.mark.parametrize(
    ("within", "inside", "outside", "words"),
    [
        (Range(0, 2.0), [0, 2, 0.5], [-1e-9, 2.1, float("nan")], "from 0 to 2"),
        (Range(0), [0, 10**9], [-1, float("inf"), 10**400], "of at least 0"),
        (Range(0, excluded=True), [1e-300], [0, 0.0, -0.0], "above 0"),
    ],
)
def test_ranges(within: Range, inside: list[float], outside: list[float], words: str) -> None:
    assert all(number in within for number in inside)
    assert not any(number in within for number in outside)
    assert str(within) == words

"""Names in both spellings, and every problem in Google's words."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server.errors import InvalidArgument
from server.wire.fields import tallied
from server.wire.message import parse
from server.wire.requests import GenerateContentRequest
from server.wire.support import MAX_NAMED

TYPES = "type.googleapis.com/google.ai.generativelanguage.v1beta"


def problems(payload: Any) -> list[tuple[str, str]]:
    with pytest.raises(InvalidArgument) as caught:
        parse(GenerateContentRequest, payload)
    assert caught.value.message == "\n".join(violation.description for violation in caught.value.violations)
    return [tuple(violation) for violation in caught.value.violations]


def test_unknown_names() -> None:
    payload = {"x": 1, "generationConfig": {"y": 2}, "contents": [{"parts": [{"text": "a"}, {"text": "b", "z": None}]}]}
    assert problems(payload | {"contents": [{"parts": [{"text": "a"}, {"text": "b", "zZ": 1}]}]}) == [
        (
            "contents[0].parts[1]",
            "Invalid JSON payload received. Unknown name \"zZ\" at 'contents[0].parts[1]': Cannot find field.",
        ),
        (
            "generation_config",
            "Invalid JSON payload received. Unknown name \"y\" at 'generation_config': Cannot find field.",
        ),
        ("", 'Invalid JSON payload received. Unknown name "x": Cannot find field.'),
    ]


def test_a_field_in_both_spellings() -> None:
    both = {"systemInstruction": {"parts": []}, "system_instruction": {"parts": []}}
    expected = "oneof field '_system_instruction' is already set. Cannot set 'system_instruction'"
    assert problems(both) == [("", f"Invalid value at 'request' (oneof), {expected}")]


def test_two_kinds_of_data_in_one_part() -> None:
    [(field, text)] = problems({"contents": [{"parts": [{"text": "a", "inlineData": {}}]}]})
    assert field == "contents[0].parts[0]"
    assert text.endswith("(oneof), oneof field 'data' is already set. Cannot set 'inlineData'")


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        ([], f"Invalid value at 'request' ({TYPES}.GenerateContentRequest), […]"),
        ({"contents": [5]}, f"Invalid value at 'contents[0]' ({TYPES}.Content), 5"),
        ({"contents": [{"parts": [{"text": 5}]}]}, "Invalid value at 'contents[0].parts[0].text' (TYPE_STRING), 5"),
        ({"store": "yes"}, "Invalid value at 'store' (TYPE_BOOL), \"yes\""),
        ({"generationConfig": {"seed": True}}, "Invalid value at 'generation_config.seed' (TYPE_INT32), true"),
        ({"generationConfig": {"topK": 40.5}}, "Invalid value at 'generation_config.top_k' (TYPE_INT32), 40.5"),
        ({"generationConfig": {"topP": "x"}}, "Invalid value at 'generation_config.top_p' (TYPE_FLOAT), \"x\""),
        ({"contents": [{"parts": [{"thoughtSignature": "a!b"}]}]}, "(TYPE_BYTES), Base64 decoding failed"),
        ({"safetySettings": [{"category": "X"}]}, "v1beta.HarmCategory), \"X\""),
        ({"safetySettings": [{"threshold": 99}]}, "v1beta.HarmBlockThreshold), 99"),
        ({"labels": {"a": 1}}, "Invalid value at 'labels.a' (TYPE_STRING), 1"),
        ({"generationConfig": {"temperature": 3}}, "generation_config.temperature: 3 must be at most 2"),
        ({"generationConfig": {"topP": -0.1}}, "generation_config.top_p: -0.1 must be at least 0"),
        ({"generationConfig": {"candidateCount": 9}}, "generation_config.candidate_count: 9 must be at most 8"),
        ({"generationConfig": {"candidateCount": 0}}, "generation_config.candidate_count: 0 must be at least 1"),
        ({"generationConfig": {"maxOutputTokens": 0}}, "generation_config.max_output_tokens: 0 must be at least 1"),
        ({"generationConfig": {"logprobs": 21}}, "generation_config.logprobs: 21 must be at most 20"),
        ({"generationConfig": {"presencePenalty": 2.5}}, "generation_config.presence_penalty: 2.5 must be at most 2"),
        ({"generationConfig": {"stopSequences": list("abcdefghijklmnopq")}}, "at most 16, not 17"),
        ({"generationConfig": {"stopSequences": [""]}}, "stop_sequences[0]: \"\" must not be empty"),
        ({"generationConfig": {"stopSequences": ["x" * 300]}}, "must have a length of at most 256, not 300"),
    ],
)  # fmt: skip
def test_wrong_values(payload: Any, text: str) -> None:
    [(_, found)] = problems(payload)
    assert text in found


def test_many_problems_are_told_in_part() -> None:
    found = problems({f"x{index}": 1 for index in range(100)})
    assert len(found) == 21
    assert "80 more" in found[-1][1]


MANY = 30_000
WRONG_PARTS = {
    "unknown": {"x": 1},
    "type": {"text": 1},
    "base64": {"thoughtSignature": "a!b"},
    "enum": {"mediaProcessing": "X"},
    "both spellings": {"inlineData": {}, "inline_data": {}},
    "two kinds": {"text": "a", "fileData": {}},
    "no message": 1,
}


def errors_of(payload: Any) -> tuple[int, int]:
    """How many errors pydantic made of a message, and how many problems were found."""
    with tallied() as tally, pytest.raises(ValidationError) as caught:
        GenerateContentRequest.model_validate(payload)
    return caught.value.error_count(), tally.found


@pytest.mark.parametrize("part", WRONG_PARTS.values(), ids=WRONG_PARTS)
def test_a_problem_of_each_part_costs_no_error_for_each(part: Any) -> None:
    payload = {"contents": [{"parts": [{"text": "a"}, *[part] * MANY]}]}
    assert errors_of(payload) == (MAX_NAMED, MANY)
    found = problems(payload)
    assert [field.split("]")[1] for field, _ in found[:-1]] == [f".parts[{index + 1}" for index in range(MAX_NAMED)]
    assert found[-1] == ("", f"… and {MANY - MAX_NAMED} more problems")


@pytest.mark.parametrize(
    "payload",
    [
        {f"k{index}": 1 for index in range(MANY)},
        {"contents": [{f"k{index}": 1 for index in range(MANY)}]},
        {"contents": [{"x": 1}] * MANY},
        {"contents": [1] * MANY},
        {"labels": {f"k{index}": 1 for index in range(MANY)}},
        {"generationConfig": {"responseModalities": ["X"] * MANY}},
        {"tools": [{"functionDeclarations": [1] * MANY}]},
    ],
)
def test_nor_does_any_other_problem_that_can_be_repeated(payload: Any) -> None:
    assert errors_of(payload) == (MAX_NAMED, MANY)
    assert len(problems(payload)) == MAX_NAMED + 1


@pytest.mark.parametrize("stop", ["", 1, "x" * 300])
def test_too_many_stop_sequences_are_one_problem_whatever_is_in_them(stop: Any) -> None:
    [(_, text)] = problems({"generationConfig": {"stopSequences": [stop] * MANY}})
    assert text.endswith(f"must have a length of at most 16, not {MANY}")


def test_problems_of_one_request_do_not_count_in_the_next() -> None:
    for _ in range(2):
        assert len(problems({"contents": [{"x": 1}] * (MAX_NAMED - 1)})) == MAX_NAMED - 1


def test_both_spellings_at_every_level() -> None:
    camel = {
        "systemInstruction": {"parts": [{"text": "s", "thoughtSignature": "AAAA"}]},
        "generationConfig": {"maxOutputTokens": 3, "thinkingConfig": {"includeThoughts": True}},
        "safetySettings": [{"category": "HARM_CATEGORY_HARASSMENT"}],
    }
    snake = {
        "system_instruction": {"parts": [{"text": "s", "thought_signature": "AAAA"}]},
        "generation_config": {"max_output_tokens": 3, "thinking_config": {"include_thoughts": True}},
        "safety_settings": [{"category": "HARM_CATEGORY_HARASSMENT"}],
    }
    assert parse(GenerateContentRequest, camel) == parse(GenerateContentRequest, snake)


def test_data_of_the_user_is_not_renamed() -> None:
    data = {"aB": {"c_d": [1.0, None]}, "maxOutputTokens": 1, "max_output_tokens": 2}
    wire = parse(
        GenerateContentRequest,
        {
            "contents": [{"parts": [{"functionCall": {"name": "f", "args": data}}]}],
            "tools": [{"functionDeclarations": [{"name": "f", "parametersJsonSchema": data, "parameters": data}]}],
            "generationConfig": {"responseJsonSchema": data, "responseSchema": data},
            "labels": {"aB": "x", "c_d": "y"},
        },
    )
    call = wire.contents[0].parts[0].function_call
    declaration = wire.tools[0].function_declarations[0]
    assert call is not None
    assert call.args == declaration.parameters == declaration.parameters_json_schema == data
    assert wire.generation_config.response_json_schema == wire.generation_config.response_schema == data
    assert wire.labels == {"aB": "x", "c_d": "y"}


def test_null_is_absence() -> None:
    payload = {"contents": None, "generationConfig": {"seed": None, "top_k": None}, "store": None, "tools": None}
    assert parse(GenerateContentRequest, payload).generation_config.model_fields_set == set()
    assert parse(GenerateContentRequest, payload).model_fields_set == {"generation_config"}


@pytest.mark.parametrize(
    "contents",
    ["hi", ["hi"], {"parts": "hi"}, {"parts": {"text": "hi"}}, [{"parts": ["hi"]}], [{"parts": [{"text": "hi"}]}]],
)
def test_single_values_and_strings_stand_for_lists_and_messages(contents: Any) -> None:
    wire = parse(GenerateContentRequest, {"contents": contents})
    assert [part.text for content in wire.contents for part in content.parts] == ["hi"]


@pytest.mark.parametrize("instruction", ["hi", {"parts": "hi"}, {"parts": {"text": "hi"}}])
def test_a_system_instruction_may_be_a_string(instruction: Any) -> None:
    wire = parse(GenerateContentRequest, {"systemInstruction": instruction})
    assert wire.system_instruction is not None
    assert [part.text for part in wire.system_instruction.parts] == ["hi"]


def test_the_old_name_of_the_json_schema() -> None:
    wire = parse(GenerateContentRequest, {"generationConfig": {"_responseJsonSchema": {"type": "object"}}})
    assert wire.generation_config.response_json_schema == {"type": "object"}

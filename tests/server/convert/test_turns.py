"""Conversations with calls: which result belongs to which call, and what cannot be a conversation."""

from __future__ import annotations

import base64
import itertools
from typing import Any

import pytest

from server.convert.messages import chat_messages
from server.convert.tokens import Message
from server.errors import InvalidArgument
from server.families import CASTOR, FAMILIES, Family
from server.wire.message import parse
from server.wire.requests import GenerateContentRequest

FAMILY = {family.name: family for family in FAMILIES}
HERMES = FAMILY["hermes"]
GO = {"role": "user", "parts": [{"text": "go"}]}


def call(name: str, call_id: str | None = None, **args: Any) -> dict[str, Any]:
    return {"functionCall": {"name": name, "args": args, "id": call_id}}


def result(name: str, response: Any = None, call_id: str | None = None) -> dict[str, Any]:
    return {"functionResponse": {"name": name, "response": response, "id": call_id}}


def model(*parts: Any) -> dict[str, Any]:
    return {"role": "model", "parts": list(parts)}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "parts": list(parts)}


def opened(signature: bytes) -> str | None:
    return signature.removeprefix(b"ours:").decode() if signature.startswith(b"ours:") else None


def messages(*contents: Any, family: Family = HERMES) -> list[Message]:
    wire = parse(GenerateContentRequest, {"contents": list(contents)})
    return chat_messages(wire, family=family, control_texts=("<|x|>",), reopen=opened)


def results(*contents: Any) -> list[tuple[str, str, str]]:
    found = messages(*contents)
    return [(m["tool_call_id"], m["name"], m["content"]) for m in found if m["role"] == "tool"]


def test_a_loop_as_sdks_send_it() -> None:
    found = messages(
        GO,
        model({"text": "let me", "thought": True}),
        model({"text": "I add."}, call("add", "call_1", a=1, b=2.0)),
        user(result("add", {"result": 3})),
        model({"text": "It is 3."}),
        user({"text": "thanks"}),
    )
    function = {"name": "add", "arguments": {"a": 1, "b": 2.0}}
    assert found == [
        {"role": "user", "content": "go"},
        {
            "role": "assistant",
            "content": "I add.",
            "tool_calls": [{"id": "call00000", "type": "function", "function": function}],
        },
        {"role": "tool", "content": '{"result": 3}', "name": "add", "tool_call_id": "call00000"},
        {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": "thanks"},
    ]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_results_are_matched_by_id(order: tuple[int, ...]) -> None:
    calls = [call("f", f"id{index}") for index in range(3)]
    answers = [result("f", {"n": index}, f"id{index}") for index in order]
    assert [text for _, _, text in results(GO, model(*calls), user(*answers))] == ['{"n": 0}', '{"n": 1}', '{"n": 2}']


def test_without_ids_results_are_matched_by_name_and_order() -> None:
    calls = [call("f", "a"), call("g", "b"), call("f", "c")]
    answers = [result("f", {"n": 0}), result("f", {"n": 2}), result("g", {"n": 1})]
    found = results(GO, model(*calls), user(*answers))
    assert found == [
        ("call00000", "f", '{"n": 0}'),
        ("call00001", "g", '{"n": 1}'),
        ("call00002", "f", '{"n": 2}'),
    ]


def test_an_id_goes_before_the_order() -> None:
    calls, answers = [call("f", "a"), call("f", "b")], [result("f", {"n": 1}), result("f", {"n": 0}, "a")]
    assert [text for _, _, text in results(GO, model(*calls), user(*answers))] == ['{"n": 0}', '{"n": 1}']


def test_results_may_come_in_several_contents_and_some_may_be_missing() -> None:
    calls = [call("f"), call("g"), call("h")]
    found = messages(GO, model(*calls[:2]), model(calls[2]), user(result("h")), user(result("f"), {"text": "and?"}))
    assert [m["role"] for m in found] == ["user", "assistant", "tool", "tool", "user"]
    assert [m["name"] for m in found if m["role"] == "tool"] == ["f", "h"]
    assert found[-1]["content"] == "and?"


def test_ids_number_the_calls_of_the_whole_conversation() -> None:
    loop = [model(call("f")), user(result("f"))]
    assert [place for place, _, _ in results(GO, *loop, *loop)] == ["call00000", "call00001"]


def test_one_call_at_a_time_where_the_template_knows_no_more() -> None:
    found = messages(
        GO, model({"text": "so"}, call("f"), call("g")), user(result("g"), result("f")), family=FAMILY["gpt-oss"]
    )
    assert [m["role"] for m in found] == ["user", "assistant", "tool", "assistant", "tool"]
    assert [m["name"] for m in found if m["role"] == "tool"] == ["f", "g"]
    assert [m["content"] for m in found if m["role"] == "assistant"] == ["so", ""]


def test_castors_own_words() -> None:
    loop = [model({"text": "so"}, call("f", a="é")), user(result("f", {"r": 1}))]
    found = messages(GO, *loop, *loop, user({"text": "why?"}), family=CASTOR)
    assert [m["content"] for m in found] == [
        "go",
        'so\n<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>',
        'f returned {"r": 1}.\nNow answer my question.',
        'so\n<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>',
        'f returned {"r": 1}.\nwhy?',
    ]


def signed(part: dict[str, Any], text: str) -> dict[str, Any]:
    return {**part, "thoughtSignature": base64.b64encode(text.encode()).decode()}


@pytest.mark.parametrize(
    "turn",
    [
        [model(signed(call("f"), "ours:so"), signed(call("g"), "ours:so"))],
        [model(signed({"text": "so", "thought": True}, "ours:so"), call("f"), call("g"))],
        [model(signed({"text": "hm", "thought": True}, "ours:so")), model(call("f"), signed(call("g"), "foreign"))],
    ],
)
def test_a_signature_brings_the_thoughts_back(turn: list[Any]) -> None:
    assistant = messages(GO, *turn, user(result("f")))[1]
    assert assistant.get("reasoning_content") == "so"
    assert len(assistant["tool_calls"]) == 2


def test_foreign_signatures_say_nothing() -> None:
    assistant = messages(GO, model(signed(call("f"), "skip_thought_signature_validator")), user(result("f")))[1]
    assert "reasoning_content" not in assistant


@pytest.mark.parametrize(
    ("contents", "field", "text"),
    [
        ([GO, user(result("f"))], "contents[1].parts[0].function_response", "immediately after a function call turn"),
        (
            [GO, model(call("f")), user(result("f")), model({"text": "x"}), user(result("f"))],
            "contents[4].parts[0].function_response",
            "immediately after a function call turn",
        ),
        ([GO, model(call("f")), user(result("f"), result("f"))], "contents[2].parts[1]", "answers none of the calls"),
        ([GO, model(call("f")), user(result("g"))], "contents[2].parts[0]", "answers none of the calls"),
        (
            [GO, model(call("f", "a")), user(result("f", None, "b"))],
            "contents[2].parts[0]",
            "answers none of the calls",
        ),
        ([GO, model(call(""))], "contents[1].parts[0].function_call.name", "Name cannot be empty."),
        ([GO, model(call("f")), user(result(""))], "contents[2].parts[0].function_response.name", "cannot be empty"),
        ([user(call("f"))], "contents[0].parts[0].function_call", "models call"),
        ([GO, model(result("f"))], "contents[1].parts[0].function_response", "users respond"),
        ([GO, model(call("f", None, **{"a<|x|>": 1}))], "contents[1].parts[0].function_call", "control token"),
        ([GO, model(call("f", None, a=[{"<|x|>": 1}]))], "contents[1].parts[0].function_call", "control token"),
    ],
)
def test_what_cannot_be_a_conversation(contents: list[Any], field: str, text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        messages(*contents)
    assert caught.value.violations[0].field.startswith(field)
    assert text in caught.value.message


def test_a_system_instruction_is_text() -> None:
    wire = parse(GenerateContentRequest, {"contents": "x", "systemInstruction": {"parts": [call("f")]}})
    with pytest.raises(InvalidArgument, match="system_instruction"):
        chat_messages(wire)

"""Conversations with calls: which result belongs to which call, and what cannot be a conversation."""

from __future__ import annotations

import base64
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.convert import turns as turns_module
from server.convert.messages import chat_messages
from server.convert.rendering import ChatMessage
from server.errors import InvalidArgument
from server.families.family import Family
from server.families.table import CASTOR, FAMILIES
from server.wire.content import Content, FunctionCall, FunctionResponse, Part
from server.wire.message import parse
from server.wire.requests import GenerateContentRequest
from server.wire.support import MAX_NAMED

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


def messages(*contents: Any, family: Family = HERMES) -> list[ChatMessage]:
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


def test_results_of_strange_ids_and_names_go_by_order() -> None:
    calls = [call("f", "a"), call("g", "b"), call("h", "c")]
    answers = [result("call_176130", {"n": 0}, "x"), result("g", {"n": 1}, "b"), result("9f é", {"n": 2})]
    assert results(GO, model(*calls), *map(user, answers)) == [
        ("call00000", "f", '{"n": 0}'),
        ("call00001", "g", '{"n": 1}'),
        ("call00002", "h", '{"n": 2}'),
    ]


def test_what_a_function_returns_is_data() -> None:
    schema = {"schema": {"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}}}
    assert results(GO, model(call("f")), user(result("f", schema))) == [("call00000", "f", json.dumps(schema))]


def test_the_system_does_not_come_between_calls_and_results() -> None:
    system = {"role": "system", "parts": [{"text": "be brief"}]}
    wire = parse(GenerateContentRequest, {"contents": [GO, model(call("f")), system, user(result("f"))]})
    found = chat_messages(wire, family=HERMES, late_system=True)
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "user"]
    assert found[-1]["content"] == "be brief"


def test_a_prompt_that_is_only_counted_may_be_a_result_alone() -> None:
    def counted(*contents: Any) -> list[str]:
        wire = parse(GenerateContentRequest, {"contents": list(contents)})
        return [message["content"] for message in chat_messages(wire, family=HERMES, counting=True)]

    assert counted(user(result("f", {"n": 1}))) == ['f returned {"n": 1}.']
    assert counted(GO, model(call("f")), user(result("f"), result("f"), {"text": "so?"})) == [
        "go",
        "",
        "{}",
        "f returned {}.\nso?",
    ]
    assert counted(GO, model(call("f"))) == ["go", ""]


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
        (
            [GO, model(call("f", "a"), call("h")), user(result("g", None, "b"))],
            "contents[2].parts[0]",
            '"g" (id "b") answers none of the calls that are open: "f" (id "a"), "h".',
        ),
        ([GO, model(call(""))], "contents[1].parts[0].function_call.name", "Name cannot be empty."),
        ([GO, model(call("f")), user(result(""))], "contents[2].parts[0].function_response.name", "cannot be empty"),
        ([user(call("f"))], "contents[0].parts[0].function_call", "models call"),
        ([GO, model(result("f"))], "contents[1].parts[0].function_response", "users respond"),
        ([GO, model(call("a b"))], "contents[1].parts[0].function_call.name", '"a b": Invalid function name.'),
        ([GO, model(call("<|x|"))], "contents[1].parts[0].function_call.name", "Invalid function name."),
        ([GO, model(call("f", None, **{"<|x|": 1}))], "contents[1].parts[0].function_call", '"<|x|"'),
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


class Noting(turns_module.Turn):
    """Counts the characters, calls and results of every turn that is made: what is copied to make them."""

    copied = 0

    def __init__(self, role: str, text: str = "", calls: Any = (), results: Any = (), *rest: Any, **more: Any) -> None:
        super().__init__(role, text, calls, results, *rest, **more)
        Noting.copied += len(text) + len(calls) + len(results)


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (user({"text": "x" * 500}), 500),
        (model({"text": "x" * 500}), 500),
        (model(call("f"), call("f")), 2),
    ],
)
def test_contents_of_one_role_are_copied_a_few_times_and_not_once_for_each(
    content: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns_module, "Turn", Noting)
    Noting.copied = 0
    wire = parse(GenerateContentRequest, {"contents": [content]})
    number = 4_000
    [turn] = turns_module.turns_of(wire.contents * number, (), opened)
    assert len(turn.text) + len(turn.calls) >= number * size
    assert Noting.copied <= 5 * number * (size + 1)


class Counted(str):
    """An id or a name that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)


@pytest.mark.parametrize("with_ids", [True, False])
def test_each_result_finds_its_call_without_a_search(with_ids: bool) -> None:
    number = 2_000
    names = [f"f{index}" for index in range(number)]

    def part(kind: type[FunctionCall | FunctionResponse], name: str) -> Any:
        return kind.model_construct(name=Counted(name), id=Counted(name if with_ids else ""))

    calls = [Part.model_construct(function_call=part(FunctionCall, name)) for name in names]
    answers = [Part.model_construct(function_response=part(FunctionResponse, name)) for name in reversed(names)]
    contents = [
        Content.model_construct(role=role, parts=parts) for role, parts in (("model", calls), ("user", answers))
    ]
    Counted.compared = 0
    _, turn = turns_module.turns_of(contents, (), opened)
    assert [found.call for found in turn.results] == list(range(number))
    assert Counted.compared <= 20 * number


@given(
    calls=st.lists(st.tuples(st.sampled_from("fg"), st.sampled_from(["", "1", "2", "3"])), max_size=6),
    answers=st.lists(st.tuples(st.sampled_from("fg"), st.sampled_from(["", "1", "2", "3"])), max_size=6),
)
def test_results_find_the_calls_that_a_search_would_find(calls: list[tuple[str, str]], answers: Any) -> None:
    """The rule as it reads: first by id, then the first call of that name where not both have ids, then by order where
    as many calls are open as results are left."""
    left = dict(enumerate(calls))
    expected = {}
    for by_id in (True, False):
        for index, (name, identity) in enumerate(answers):
            if index in expected:
                continue
            for place, (called, its) in left.items():
                if identity and identity == its if by_id else name == called and not (identity and its):
                    expected[index] = place
                    del left[place]
                    break
    rest = [index for index in range(len(answers)) if index not in expected]
    if len(rest) == len(left):
        expected |= dict(zip(rest, left, strict=True))
    found = turns_module._places(
        [turns_module.Result("", identity, name, "") for name, identity in answers],
        [FunctionCall(name=name, id=identity) for name, identity in calls],
    )
    assert found == expected


def test_of_many_unmatched_results_some_are_named_and_the_rest_counted() -> None:
    with pytest.raises(InvalidArgument) as caught:
        messages(GO, model(*[call("f" * 128)] * 50), user(*[result("g" * 128)] * 5_000))
    assert len(caught.value.violations) == MAX_NAMED + 1
    assert caught.value.message.endswith("… and 4980 more problems")
    assert len(caught.value.message) < 50_000


class Silent(str):
    """A sentence that is never put into another."""

    def __format__(self, spec: str) -> str:
        Silent.written += 1
        return super().__format__(spec)

    written = 0


def test_of_many_problems_few_are_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "_NO_DATA", Silent("nothing"))
    with pytest.raises(InvalidArgument) as caught:
        messages(user(*[{}] * 5_000))
    assert caught.value.message.endswith("… and 4980 more problems")
    assert 0 < Silent.written <= MAX_NAMED


@pytest.mark.parametrize(
    ("contents", "system", "told"),
    [
        ([GO] * 3, [], None),
        ([GO] * 4, [], "there are 4 contents, but at most 3 are read"),
        ([user(*[{"text": "x"}] * 5)], [], None),
        ([user(*[{"text": "x"}] * 6)], [], "there are 6 parts, but at most 5 are read"),
        ([GO], [{"text": "x"}] * 5, "there are 6 parts, but at most 5 are read"),
    ],
)
def test_more_pieces_than_are_read(
    contents: list[Any], system: list[Any], told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns_module, "MAX_CONTENTS", 3)
    monkeypatch.setattr(turns_module, "MAX_PARTS", 5)
    wire = parse(GenerateContentRequest, {"contents": contents, "systemInstruction": {"parts": system}})
    if told is None:
        assert chat_messages(wire)
        return
    with pytest.raises(InvalidArgument, match=told) as caught:
        chat_messages(wire)
    assert caught.value.violations[0].field == "contents"
    assert "join those of one role, or send fewer" in caught.value.message


def test_a_signature_is_opened_once_however_often_it_comes() -> None:
    openings = []

    def reopen(signature: bytes) -> str:
        openings.append(signature)
        return "so"

    loop = [model(signed(call("f"), "ours:so")), user(result("f"))]
    wire = parse(GenerateContentRequest, {"contents": [GO, *loop * 100]})
    found = chat_messages(wire, family=HERMES, reopen=reopen)
    assert sum("reasoning_content" in message for message in found) == 100
    assert len(openings) == 1


def test_the_thoughts_of_a_conversation_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "MAX_THOUGHT_CHARACTERS", 10)
    loop = [model(signed(call("f"), "ours:12345")), user(result("f"))]
    assert messages(GO, *loop, *loop)
    with pytest.raises(InvalidArgument, match="more than 10 characters of thoughts; send fewer"):
        messages(GO, *loop, *loop, *loop)

"""Contents to turns: roles, merging, folding, and what cannot be a turn."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from server.convert.messages import chat_messages
from server.errors import InvalidArgument
from server.wire.message import parse
from server.wire.requests import GenerateContentRequest


def turns(
    contents: Any, system: Any = None, has_system_role: bool = True, late_system: bool = False
) -> list[tuple[str, str]]:
    wire = parse(GenerateContentRequest, {"contents": contents, "systemInstruction": system})
    found = chat_messages(wire, has_system_role, late_system=late_system)
    return [(message["role"], message["content"]) for message in found]


def said(role: str | None, *texts: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"text": text} for text in texts]}


def test_roles() -> None:
    contents = [said("user", "a"), said("model", "b"), said("function", "c"), said("model", "d"), said(None, "e")]
    assert turns(contents) == [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "e"),
    ]


@pytest.mark.parametrize("spelled", [str.lower, str.upper, str.title])
def test_roles_in_any_case_and_of_other_formats(spelled: Any) -> None:
    users, models = ("user", "function", "tool", "context", "user_context"), ("model", "assistant")
    for user, model in itertools.product(users, models):
        contents = [said(spelled(user), "a"), said(spelled(model), "b"), said(spelled("user"), "c")]
        assert turns(contents) == [("user", "a"), ("assistant", "b"), ("user", "c")]


@pytest.mark.parametrize("role", ["system", "Developer"])
def test_what_the_system_says_in_the_contents(role: str) -> None:
    first, later = said(role, "be ", "brief"), said(role, "be kind")
    contents = [first, said("user", "a"), later, said("model", "b"), later, said("user", "c"), later]
    assert turns(contents, said("user", "be wise"), late_system=True) == [
        ("system", "be wise\n\nbe brief"),
        ("user", "a"),
        ("system", "be kind"),
        ("assistant", "b"),
        ("system", "be kind"),
        ("user", "c"),
        ("system", "be kind"),
    ]
    told = [("user", "a\nbe kind"), ("assistant", "b"), ("user", "be kind\nc\nbe kind")]
    assert turns(contents) == [("system", "be brief"), *told]
    assert turns(contents, has_system_role=False) == [("user", "be brief\n\na\nbe kind"), *told[1:]]
    assert turns([first, first]) == [("user", "be brief\n\nbe brief")]


def test_neighbours_of_one_role_are_one_turn() -> None:
    contents = [
        said("user", "one"),
        said("model", "hel"),
        said("model", "lo"),
        said("user", "two"),
        said(None, "three"),
    ]
    assert turns(contents) == [("user", "one"), ("assistant", "hello"), ("user", "two\nthree")]


def test_parts_are_joined_as_they_are() -> None:
    assert turns([said("user", "sys\n\n", "a", "", "b")]) == [("user", "sys\n\nab")]


def test_the_system_instruction() -> None:
    system = said("user", "be ", "brief")
    assert turns("hi", system) == [("system", "be brief"), ("user", "hi")]
    assert turns("hi", system, has_system_role=False) == [("user", "be brief\n\nhi")]
    assert turns([said("model", "x")], system, has_system_role=False) == [("user", "be brief"), ("assistant", "x")]
    assert turns("hi", {"parts": []}) == [("user", "hi")]


def test_thoughts_are_not_shown_again() -> None:
    thought = {"text": "hm", "thought": True}
    contents = [said("user", "a"), {"role": "model", "parts": [thought]}, {"role": "model", "parts": [thought, "b"]}]
    assert turns([*contents, said("user", "c")]) == [("user", "a"), ("assistant", "b"), ("user", "c")]


def test_a_bare_signature_is_an_empty_text() -> None:
    contents = [said("user", "a"), {"role": "model", "parts": [{"text": "b"}, {"thoughtSignature": "AAAA"}]}]
    assert turns(contents) == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("contents", "field", "text"),
    [
        ([], "contents", "* GenerateContentRequest.contents: contents is not specified"),
        (None, "contents", "* GenerateContentRequest.contents: contents is not specified"),
        (
            [said("bot", "x")],
            "contents[0].role",
            '"bot" is no role. Please use a valid role: user, function, tool, context, user_context, model, assistant, '
            "system, developer.",
        ),
        ([{"role": "user"}], "contents[0].parts", "contents.parts must not be empty."),
        ([said("user", "x"), {"parts": [{}]}], "contents[1].parts[0].data", "required oneof field 'data'"),
    ],
)
def test_what_cannot_be_a_turn(contents: Any, field: str, text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        turns(contents)
    assert caught.value.violations[0].field == field
    assert text in caught.value.message


def test_every_problem_is_named() -> None:
    with pytest.raises(InvalidArgument) as caught:
        turns([said("x", "a"), {"parts": []}, {"parts": [{}, {}]}])
    assert len(caught.value.violations) == 4

"""Calls in Python's notation, as models and templates write them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.families.python_calls import python_calls, python_value

numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
plain_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(plain_values)
def test_values_read_back_in_either_notation(value: Any) -> None:
    assert python_value(repr(value)) == value
    assert python_value(json.dumps(value)) == value


@given(st.dictionaries(st.from_regex(r"[a-z_]\w{0,5}", fullmatch=True), plain_values, max_size=3))
def test_calls_read_back(arguments: dict[str, Any]) -> None:
    call = f"f({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
    assert python_calls(call) == [{"name": "f", "arguments": arguments}]
    assert python_calls(f"[{call}, g.h()]")[1] == {"name": "g.h", "arguments": {}}


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("it's 5 o'clock", "f(a='it's 5 o'clock')"),
        ("say 'yes', please", "f(a='say 'yes', please', b=1)"),
        ("two\nlines", "f(a='two\nlines')"),
        ('"quoted" (so)', "f(a='\"quoted\" (so)')"),
    ],
)
def test_texts_that_a_template_did_not_escape(text: str, arguments: str) -> None:
    (call,) = python_calls(arguments)
    assert call["arguments"]["a"] == text


def test_objects_are_json_within_a_call() -> None:
    (call,) = python_calls(r"""[f(o={"a": true, "b": [null, "\ud83d\ude00 \"x\" \/"]}, l=['x', None], n=-1.5e3)]""")
    assert call["arguments"] == {"o": {"a": True, "b": [None, '😀 "x" /']}, "l": ["x", None], "n": -1500.0}


@pytest.mark.parametrize(
    "text",
    [
        *("", "[", "[f(]", "f(a)", "f(a=)", "f(a='x)", "f(a=1 b=2)", "f(1)", "f() g()", "[f()] x"),
        *("f(a={1: 2})", "f(a=x)", "f(a='\\ud83d')"),
    ],
)
def test_what_is_no_call(text: str) -> None:
    with pytest.raises(ValueError):
        python_calls(text)


def test_a_text_of_quotes_takes_no_time() -> None:
    with pytest.raises(ValueError):
        python_calls("f(a='" + "' , " * 50_000)

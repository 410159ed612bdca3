"""JSON in the spellings that Google's parser takes beyond the standard's."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import InvalidArgument
from server.http.json_body import MAX_CONTAINERS, MAX_VALUES, parse_json
from server.http.relaxed_json import MAX_DEPTH, read_relaxed


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"{'file': {'display_name': 'TEXT'}}", {"file": {"display_name": "TEXT"}}),
        (b'{"a":{"b":1,},"c":[1,2,],}', {"a": {"b": 1}, "c": [1, 2]}),
        (b"{contents: [{parts: [{text: 'hi'}]}], max_1$: 2}", {"contents": [{"parts": [{"text": "hi"}]}], "max_1$": 2}),
        (b'{"text": "two\nlines\r\nand\ttabs"}', {"text": "two\nlines\r\nand\ttabs"}),
        (b"{'text': 'it is \"so\"\n, isn\\'t it?'}", {"text": 'it is "so"\n, isn\'t it?'}),
        (
            b"['\\u00fc', '\\n', \"\xc3\xbc\", '/* no comment */ // nor this']",
            ["ü", "\n", "ü", "/* no comment */ // nor this"],
        ),
        (b'["\\\\\n"]', ["\\\n"]),
        (b"\xef\xbb\xbf{'a': null, b: true, c: -1.5e3}", {"a": None, "b": True, "c": -1500.0}),
    ],
)
def test_spellings_beside_the_standard(raw: bytes, value: Any) -> None:
    assert parse_json(raw) == value


@pytest.mark.parametrize(
    "raw",
    [
        b"{'a': 1",
        b"{'a' 1}",
        b"{a: b}",
        b"{'a': NaN}",
        b"{'a': -Infinity,}",
        b"['\\ud800']",
        b"{'a': 1e999}",
        b"{'a': 1, // so\n}",
        b"{'a': 1, /* ' */ b: 2}",
        b"{,}",
        b"{'a': '" + b"\\",
        b"{'a': \xff}",
        b"{a: " + b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b"}",
        b"{a: " + b"[" * 50_000,
        b"{a: " + b"1" * 5000 + b"}",
    ],
)
def test_what_is_no_json_in_any_spelling(raw: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"^Invalid JSON payload received\."):
        parse_json(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"['\"'" + b",1" * MAX_VALUES + b"]",
        b"[" + b"'a'," * MAX_VALUES + b"]",
        b"['\"'" + b",{}" * (MAX_CONTAINERS - 1) + b",[{}]]",
    ],
    ids=["hidden by a quote", "texts", "objects"],
)
def test_the_limits_hold_whatever_the_quotes_hide(raw: bytes) -> None:
    with pytest.raises(ValueError, match="more than 100000"):
        read_relaxed(raw, MAX_CONTAINERS, MAX_VALUES)
    with pytest.raises(InvalidArgument):
        parse_json(raw)


def test_commas_in_texts_are_no_values() -> None:
    assert parse_json(b"{'a': '" + b"," * 90_000 + b"',}") == {"a": "," * 90_000}


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(_VALUES)
def test_standard_json_reads_the_same_in_both(value: Any) -> None:
    raw = json.dumps(value, ensure_ascii=False).encode()
    assert read_relaxed(raw, MAX_CONTAINERS, MAX_VALUES) == value


@settings(derandomize=True, max_examples=500, deadline=None)
@given(st.text(alphabet="{}[]'\",:\\/*\n\r\tau1 ", max_size=40))
def test_nothing_but_a_value_or_a_refusal_comes_of_any_text(text: str) -> None:
    with suppress(InvalidArgument):
        json.dumps(parse_json(text.encode()), allow_nan=False)

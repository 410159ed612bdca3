"""Stop strings against a brute-force search over the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.stops import StopMatcher


def feed(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    matcher = StopMatcher(stops)
    shown = [matcher.feed(piece) for piece in pieces]
    return [*shown, matcher.flush()], matcher.stopped


def cut(text: str, stops: list[str]) -> str | None:
    """The text before the stop that is complete first, the longest of several; None if there is none."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return None


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        ([], ["ab", "c"], ["ab", "c", ""]),
        (["STOP"], ["a ST", "OP b"], ["a ", "", ""]),
        (["STOP"], ["a ST", "ART"], ["a ", "START", ""]),
        (["x"], ["x"], ["", ""]),
        (["ab"], ["abab"], ["", ""]),
        (["b", "abc"], ["xab", "c"], ["xa", "", ""]),
        (["b", "ab"], ["xa", "b"], ["x", "", ""]),
        (["aab"], ["aa", "a", "b"], ["", "a", "", ""]),
        (["\n\n"], ["a\n", "b\n", "\n"], ["a", "\nb", "", ""]),
        (["END"], ["the E", "N"], ["the ", "", "EN"]),
        (["日本"], ["日", "本語"], ["", "", ""]),
        (["ab"], ["", "a", "", "b"], ["", "", "", "", ""]),
    ],
)
def test_examples(stops: list[str], pieces: list[str], shown: list[str]) -> None:
    assert feed(stops, pieces)[0] == shown


def test_nothing_follows_a_stop() -> None:
    matcher = StopMatcher(["."])
    assert matcher.feed("a.b") == "a"
    assert matcher.stopped
    assert matcher.feed("c.") == matcher.flush() == ""


words = st.text(alphabet="ab", min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(st.lists(words, max_size=4), st.lists(st.text(alphabet="abc", max_size=4), max_size=8))
def test_any_stops_in_any_pieces(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    expected = cut(text, stops)
    shown, stopped = feed(stops, pieces)
    assert stopped == (expected is not None)
    assert "".join(shown) == (text if expected is None else expected)


@settings(max_examples=150, deadline=None)
@given(st.lists(words, min_size=1, max_size=4), st.lists(st.text(alphabet="ab", max_size=4), max_size=8))
def test_no_more_is_held_back_than_a_possible_head(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(stops)
    text, shown = "", ""
    for piece in pieces:
        text += piece
        shown += matcher.feed(piece)
        if matcher.stopped:
            return
        heads = [stop[:length] for stop in stops for length in range(len(stop))]
        held = max(len(head) for head in heads if text.endswith(head))
        assert len(text) - len(shown) == held

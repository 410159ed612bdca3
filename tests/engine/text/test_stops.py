"""Stop strings against a brute-force search over the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples

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


@settings(max_examples=examples(200))
@given(st.lists(words, max_size=4), st.lists(st.text(alphabet="abc", max_size=4), max_size=8))
def test_any_stops_in_any_pieces(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    expected = cut(text, stops)
    shown, stopped = feed(stops, pieces)
    assert stopped == (expected is not None)
    assert "".join(shown) == (text if expected is None else expected)


@settings(max_examples=examples(150))
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


Spans = list[tuple[str, str]]


def cut_outside(text: str, stops: list[str], spans: Spans) -> str | None:
    """As ``cut``, but nothing counts in the spans; tries every place at every character."""
    base, place, waiting = 0, 0, -1
    end_of_span = ""
    while place < len(text):
        place += 1
        seen = text[base:place]
        if end_of_span:
            if seen.endswith(end_of_span):
                base, end_of_span = place, ""
            continue
        begins = max(
            [(len(begin), end) for begin, end in spans if seen.endswith(begin)], default=(0, ""), key=lambda b: b[0]
        )
        heads = [n for begin, _ in spans for n in range(len(begin)) if seen.endswith(begin[:n])]
        inside_from = place - (begins[0] or max(heads, default=0))
        complete = [place - len(stop) for stop in stops if seen.endswith(stop)]
        for start in (waiting, min(complete, default=-1)):
            if 0 <= start < inside_from:
                return text[:start]
        if waiting < 0 and complete:
            waiting = min(complete)
        if begins[0]:
            base, end_of_span, waiting = place, begins[1], -1
    return text[:waiting] if waiting >= 0 else None


def feed_outside(stops: list[str], spans: Spans, pieces: list[str]) -> tuple[list[str], bool]:
    matcher = StopMatcher(stops, spans)
    shown = [matcher.feed(piece) for piece in pieces]
    return [*shown, matcher.flush()], matcher.stopped


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        (["x"], ["a<c>x</c>bx"], ["a<c>x</c>b", ""]),
        (["<"], ["a<", "c>x</", "c>b<d"], ["a", "<c>x</", "c>b", ""]),
        (["c>"], ["a<", "c", ">x</c>"], ["a<", "", "c>x</c>", ""]),
        (["<c"], ["<", "c"], ["", "", ""]),
        (["a<"], ["a<c>"], ["", ""]),
        (["xy"], ["<c>x", "y", "y</c>x", "y"], ["<c>x", "y", "y</c>", "", ""]),
        (["<cc"], ["<c", "c"], ["", "", ""]),
    ],
)
def test_stops_in_exempt_spans_do_not_count(stops: list[str], pieces: list[str], shown: list[str]) -> None:
    assert feed_outside(stops, [("<c>", "</c>")], pieces)[0] == shown


@settings(max_examples=examples(600))
@given(
    st.lists(words, min_size=1, max_size=3),
    st.lists(st.tuples(words, words), max_size=3),
    st.lists(st.text(alphabet="abc", max_size=6), max_size=8),
)
def test_any_stops_and_spans_in_any_pieces(stops: list[str], spans: Spans, pieces: list[str]) -> None:
    text = "".join(pieces)
    expected = cut_outside(text, stops, spans)
    shown, stopped = feed_outside(stops, spans, pieces)
    assert stopped == (expected is not None)
    assert "".join(shown) == (text if expected is None else expected)
    assert feed_outside(stops, spans, [text])[0] == ["".join(shown[:-1]), shown[-1]] or stopped

"""Where thoughts begin and end, against a search over the whole list of tokens."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples

from engine.api.sampling import Thinking
from engine.core.thinking import Thoughts


def follow(thoughts: Thoughts, tokens: list[int]) -> list[bool]:
    """For each token whether it is one of thoughts; what is still held at the end is not."""
    told: list[bool] = []
    held = 0
    for token in tokens:
        was_inside = thoughts.inside
        thoughts.feed(token)
        held += 1
        release = held - thoughts.held
        told += [was_inside or thoughts.inside] * release
        held -= release
    return told + [False] * held


def expected(thinking: Thinking, tokens: list[int], constrained: bool) -> list[bool]:
    told = [False] * len(tokens)
    inside, begin, place = thinking.open, 0, 0
    may_open = bool(thinking.start)
    while place < len(tokens) or inside:
        marker = thinking.end if inside else thinking.start
        ends = [
            end
            for end in range(place + len(marker), len(tokens) + 1)
            if tuple(tokens[end - len(marker) : end]) == marker
        ]
        if inside:
            stop = ends[0] if ends else len(tokens)
            told[begin:stop] = [True] * (stop - begin)
            inside, place, may_open = False, stop, may_open and not constrained
        elif not may_open or not ends or (constrained and ends[0] != len(marker)):
            break
        else:
            inside, begin, place = True, ends[0] - len(marker), ends[0]
    return told


ids = st.integers(1, 3)
markers = st.lists(ids, min_size=1, max_size=3).map(tuple)


@settings(max_examples=examples(400))
@given(markers, markers, st.booleans(), st.booleans(), st.lists(ids, max_size=16))
def test_any_tokens(
    start: tuple[int, ...], end: tuple[int, ...], is_open: bool, constrained: bool, tokens: list[int]
) -> None:
    thinking = Thinking(start, end, is_open)
    thoughts = Thoughts(thinking, constrained=constrained)
    told = follow(thoughts, tokens)
    assert told == expected(thinking, tokens, constrained)
    assert thoughts.count == sum(told)
    assert thoughts.forced is None


@settings(max_examples=examples(200))
@given(markers, st.integers(0, 5), st.lists(ids, max_size=16))
def test_the_budget_forces_the_end(end: tuple[int, ...], budget: int, tokens: list[int]) -> None:
    thoughts = Thoughts(Thinking((), end, open=True, budget=budget), constrained=False)
    for token in tokens:
        thoughts.feed(token if thoughts.forced is None else thoughts.forced)
    assert thoughts.count <= budget + len(end)
    assert thoughts.forced is None or thoughts.count >= budget
    assert not (thoughts.inside and len(tokens) >= budget + len(end))


def test_a_budget_holds_for_all_thoughts_of_an_answer_together() -> None:
    thoughts = Thoughts(Thinking((1,), (2,), budget=2), constrained=False)
    for token in (1, 7, 2, 1):
        thoughts.feed(token)
        assert thoughts.forced is None or token == 1
    assert thoughts.forced is None
    thoughts.feed(7)
    assert thoughts.forced == 2

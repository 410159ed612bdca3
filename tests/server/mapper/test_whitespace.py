"""White space at borders is trimmed, however the text comes, and held back without being copied."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.mapper.whitespace import WhitespaceTrimmer

TEXTS = st.lists(st.sampled_from(["a", "b", " ", "\n", "\t ", "a b"]), max_size=8).map("".join)


def trimmed(in_thought: bool, regions: list[tuple[bool, list[str]]]) -> list[str]:
    """What is shown of each region, given as whether it is plain text and its pieces."""
    trimmer = WhitespaceTrimmer(in_thought)
    shown: list[str] = []
    for is_answer, pieces in regions:
        trimmer.start_region(is_answer)
        shown.append("".join(map(trimmer.feed, pieces)))
    return [*shown[:-1], shown[-1] + trimmer.flush()]


@given(st.booleans(), st.lists(st.tuples(st.booleans(), TEXTS), min_size=1, max_size=4))
def test_any_text_is_trimmed_the_same_in_every_cut(in_thought: bool, regions: list[tuple[bool, str]]) -> None:
    whole = trimmed(in_thought, [(is_answer, [text]) for is_answer, text in regions])
    assert trimmed(in_thought, [(is_answer, list(text)) for is_answer, text in regions]) == whole
    for place, ((is_answer, text), shown) in enumerate(zip(regions, whole, strict=True)):
        has_border_before = in_thought or place > 0 or not is_answer
        has_border_behind = place < len(regions) - 1 or not is_answer
        expected = text.lstrip() if has_border_before else text
        assert shown == (expected.rstrip() if has_border_behind else expected)


def test_thoughts_that_the_prompt_opened_are_trimmed() -> None:
    trimmer = WhitespaceTrimmer(in_thought=True)
    assert (trimmer.feed(" \n"), trimmer.feed(" hm \n"), trimmer.flush()) == ("", "hm", "")


def test_white_space_that_is_held_back_is_not_copied_for_each_piece() -> None:
    trimmer = WhitespaceTrimmer(in_thought=False)
    assert trimmer.feed("a") == "a"
    held = trimmer._held
    for _ in range(1000):
        assert trimmer.feed("\n") == ""
    assert trimmer._held is held
    assert trimmer.feed("b") == "\n" * 1000 + "b"

"""What windows see, and how many blocks a sequence holds of them, by counting."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.api.block_groups import Window, sequence_blocks

WINDOWS = st.builds(Window, st.integers(1, 40), st.booleans())


@given(window=WINDOWS, position=st.integers(0, 200))
def test_what_a_window_sees_moves_forward(window: Window, position: int) -> None:
    first = window.first_seen(position)
    assert position - window.size < first <= position
    assert first <= window.first_seen(position + 1)
    if window.chunked:
        assert first % window.size == 0
    else:
        assert first == max(0, position - window.size + 1)


@given(window=WINDOWS, computed=st.integers(0, 200), launched=st.integers(1, 30), block_size=st.integers(1, 9))
def test_a_sequence_never_needs_more_blocks(window: Window, computed: int, launched: int, block_size: int) -> None:
    """It needs those from the first token that the next one sees to the last one that is launched."""
    needed = (computed + launched - 1) // block_size - window.first_seen(computed) // block_size + 1
    assert needed <= window.most_blocks(launched, block_size)
    assert needed <= sequence_blocks(window, computed + launched, block_size, launched)


def test_a_window_is_named_as_people_say_it() -> None:
    assert str(Window(512)) == "sliding window of 512"
    assert str(Window(8192, chunked=True)) == "chunks of 8192 tokens"

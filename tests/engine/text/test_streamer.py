"""From tokens to text that may be shown: characters and stop strings together."""

from __future__ import annotations

from support.tiny import tiny_tokenizer

from engine.text.detokenizer import Detokenizer, TokenTexts, hidden_ids
from engine.text.stops import StopMatcher
from engine.text.streamer import Streamer

TOKENIZER = tiny_tokenizer()


def stream(text: str, *stops: str, drop: int = 0) -> tuple[list[str], bool]:
    """Feed the text byte by byte, without the last ``drop`` bytes; stop feeding at a stop."""
    streamer = Streamer(Detokenizer(TokenTexts(TOKENIZER), hidden_ids(TOKENIZER)), StopMatcher(stops))
    token_ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    shown = []
    for token_id in token_ids[: len(token_ids) - drop]:
        shown.append(streamer.feed(token_id))
        if streamer.stopped:
            break
    return [*shown, streamer.flush()], streamer.stopped


def test_a_stop_of_characters_of_several_bytes() -> None:
    assert stream("a👍b", "👍") == (["a", "", "", "", "", ""], True)


def test_a_stop_that_begins_inside_a_held_back_head() -> None:
    assert stream("11112", "112") == (["", "", "1", "1", "", ""], True)


def test_the_end_shows_the_held_back_head_and_the_incomplete_character() -> None:
    assert stream("xST👍", "STOP", drop=1) == (["x", "", "", "", "", "", "ST\ufffd"], False)


def test_an_incomplete_character_may_complete_a_stop() -> None:
    shown, stopped = stream("ab👍", "b\ufffd", drop=1)
    assert ("".join(shown), stopped) == ("a", True)

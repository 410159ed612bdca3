"""Tokens and when they came."""

from __future__ import annotations

from server.bench.wire.counting import Outcome, TokenCounter
from server.bench.wire.protocols import Progress


def follow(*arrivals: tuple[float, list[Progress]]) -> Outcome:
    outcome = Outcome(0.0)
    counter = TokenCounter(outcome)
    for instant, events in arrivals:
        counter.take(events, instant)
    counter.settle()
    return outcome


def test_running_totals_tell_how_many_tokens_a_piece_held() -> None:
    outcome = follow(
        (1.0, [Progress(True, 1, 7)]),
        (1.5, [Progress(True, 2), Progress(True, 4)]),
        (2.5, [Progress(True, 5)]),
        (2.5, [Progress(False, 5, 7, 3, "STOP")]),
    )
    assert (outcome.first, outcome.gaps) == (1.0, [(0.5, 3), (1.0, 1)])
    assert (outcome.output_tokens, outcome.counted_by, outcome.finish_reason) == (5, "usage", "STOP")
    assert (outcome.prompt_tokens, outcome.cached_tokens) == (7, 3)


def test_tokens_without_text_count_with_the_text_that_follows() -> None:
    outcome = follow((1.0, [Progress(True, 1)]), (2.0, [Progress(False, 2)]), (3.0, [Progress(True, 3)]))
    assert outcome.gaps == [(2.0, 2)]


def test_text_without_a_token_is_the_rest_of_one_before() -> None:
    outcome = follow((1.0, [Progress(True, 1)]), (2.0, [Progress(True, 1)]))
    assert outcome.gaps == [(1.0, 0)]


def test_a_total_at_the_end_says_how_many_tokens_a_chunk_had() -> None:
    usage = Progress(output_tokens=6, prompt_tokens=5)
    outcome = follow((1.0, [Progress(True)]), (2.0, [Progress(True)]), (3.0, [Progress(True)]), (3.0, [usage]))
    assert outcome.gaps == [(1.0, 2.0), (1.0, 2.0)]
    assert (outcome.output_tokens, outcome.counted_by) == (6, "usage")


def test_without_any_total_chunks_are_counted_and_that_is_said() -> None:
    outcome = follow((1.0, [Progress()]), (2.0, [Progress(True)]), (3.0, [Progress(True), Progress(True)]))
    assert (outcome.first, outcome.gaps) == (2.0, [(1.0, 2)])
    assert (outcome.output_tokens, outcome.counted_by) == (3, "chunks")


def test_an_error_is_kept() -> None:
    outcome = follow((1.0, [Progress(True, 1)]), (2.0, [Progress(error="gone")]), (3.0, [Progress()]))
    assert outcome.error == "gone"
    assert not outcome.succeeded


def test_nothing_at_all() -> None:
    outcome = follow()
    assert (outcome.first, outcome.output_tokens, outcome.gaps) == (None, 0, [])

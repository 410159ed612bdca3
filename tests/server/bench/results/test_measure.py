"""Percentiles, summaries, medians of rounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.load import Load
from server.bench.results.measure import (
    Limits,
    Spread,
    inter_token_seconds,
    percentile,
    spread,
    summarise,
    tail,
    time_per_output_token,
)
from server.bench.wire.counting import Outcome

LIMITS = Limits(1.0, 0.5)


def outcome(intended: float = 0.0, first: float = 0.5, gaps: tuple[tuple[float, float], ...] = ((0.2, 1), (0.4, 2))):
    """Three gaps' worth of a request that ends with its last token."""
    made = Outcome(intended, sent=intended + 0.1, first=first, gaps=list(gaps), counted_by="usage")
    made.ended = first + sum(seconds for seconds, _ in gaps)
    made.output_tokens = 1 + round(sum(tokens for _, tokens in gaps))
    made.prompt_tokens = 40
    return made


def test_percentiles_interpolate() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3.0], 0.99) == 3.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([1.0, 2.0, 3.0], 1.0) == 3.0
    assert percentile([0.0, 10.0], 0.99) == pytest.approx(9.9)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_percentile_lies_between_the_extremes_and_grows(values: list[float], share: float) -> None:
    found, most = percentile(values, share), percentile(values, 1.0)
    assert found is not None
    assert most == max(values)
    assert min(values) <= found <= max(values) or found == pytest.approx(max(values))


def test_a_pause_counts_once_for_each_token_that_ended_it() -> None:
    assert inter_token_seconds([outcome()]) == pytest.approx([0.2, 0.2, 0.2])
    assert inter_token_seconds([outcome(gaps=((0.3, 0), (0.3, 1)))]) == [0.3]


def test_time_per_output_token() -> None:
    assert time_per_output_token(outcome()) == pytest.approx(0.2)
    assert time_per_output_token(outcome(gaps=())) is None


def test_a_summary() -> None:
    failed, left = Outcome(0.0, error="no"), Outcome(0.0, first=0.1, cancelled=True, output_tokens=2)
    summary = summarise(Load([outcome(), outcome(1.0, 2.5), failed, left], 5.0, 0.5), LIMITS)
    assert (summary.requests, summary.errors, summary.cancelled) == (4, 1, 1)
    assert summary.output_tokens == 4 + 4 + 2
    assert summary.output_tokens_per_second == pytest.approx(2.0)
    assert summary.requests_per_second == pytest.approx(0.4)
    assert summary.ttft_p50 == pytest.approx(1.0)  # from the intended instant: 0.5 and 1.5
    assert summary.e2e_p50 == pytest.approx(1.6)
    assert (summary.itl_p50, summary.tpot_p50) == (pytest.approx(0.2), pytest.approx(0.2))
    assert (summary.mean_output_tokens, summary.mean_prompt_tokens, summary.mean_cached_tokens) == (4, 40, None)
    assert summary.goodput == pytest.approx(0.2)  # the second one was late
    assert summary.client_cpu_share == pytest.approx(0.1)
    assert summary.counted_by == "usage"


def test_a_99th_percentile_needs_a_hundred_values() -> None:
    few, many = Load([outcome()] * 99, 1.0, 0.1), Load([outcome()] * 100, 1.0, 0.1)
    assert tail([1.0] * 99) is None
    assert (summarise(few, LIMITS).ttft_p99, summarise(few, LIMITS).ttft_samples) == (None, 99)
    assert summarise(few, LIMITS).itl_p99 == pytest.approx(0.2)
    assert summarise(few, LIMITS).itl_samples == 3 * 99
    assert summarise(many, LIMITS).ttft_p99 == pytest.approx(0.5)


def test_a_load_that_failed_altogether() -> None:
    summary = summarise(Load([Outcome(0.0, error="no")], 1.0, 0.1), LIMITS)
    assert (summary.errors, summary.output_tokens_per_second, summary.ttft_p50) == (1, 0.0, None)


def test_goodput_needs_both_limits() -> None:
    slow = outcome(gaps=((2.0, 2),))
    assert summarise(Load([slow], 1.0, 0.0), LIMITS).goodput == 0.0
    assert summarise(Load([outcome(gaps=())], 1.0, 0.0), LIMITS).goodput == 1.0


def test_rounds() -> None:
    assert spread([3.0, None, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert spread([None]) is None

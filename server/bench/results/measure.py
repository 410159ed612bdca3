"""Statistics: percentiles of one load, medians and ratios over rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from server.bench.load import Load
from server.bench.wire.counting import Outcome

TAIL_SAMPLES = 100
"""The 99th percentile of fewer values would be little but their maximum."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits a request must meet to count as goodput: seconds to the first token, and seconds per further token."""

    ttft: float
    tpot: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One load in numbers; times in seconds, None where nothing was measured.

    TTFT counts from the intended instant. ITL is over all tokens after the first of all answers: a pause that ended
    with several tokens at once counts once for each, divided by their number. TPOT is the mean time of a token after
    the first, one number a request. ``ttft_samples`` and ``itl_samples`` say how many values there were; a 99th
    percentile needs ``TAIL_SAMPLES``. ``goodput`` is the requests per second that kept both limits, ``good_share``
    their share of all requests.
    """

    requests: int
    errors: int
    cancelled: int
    seconds: float
    output_tokens: int
    mean_output_tokens: float | None
    mean_prompt_tokens: float | None
    mean_cached_tokens: float | None
    counted_by: str
    output_tokens_per_second: float
    requests_per_second: float
    goodput: float
    good_share: float
    ttft_samples: int
    ttft_p50: float | None
    ttft_p99: float | None
    itl_samples: int
    itl_p50: float | None
    itl_p99: float | None
    tpot_p50: float | None
    e2e_p50: float | None
    e2e_p99: float | None
    client_cpu_share: float


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which ``share`` (0 to 1) of them lie, interpolated linearly; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def tail(values: Sequence[float]) -> float | None:
    """The 99th percentile, None of too few values."""
    return percentile(values, 0.99) if len(values) >= TAIL_SAMPLES else None


def inter_token_seconds(outcomes: Iterable[Outcome]) -> list[float]:
    """The time of each token after the first of its answer."""
    return [
        seconds / tokens
        for outcome in outcomes
        for seconds, tokens in outcome.gaps
        if tokens
        for _ in range(max(round(tokens), 1))
    ]


def time_per_output_token(outcome: Outcome) -> float | None:
    """The mean time of a token after the first, None where there is none."""
    tokens = sum(tokens for _, tokens in outcome.gaps)
    return sum(seconds for seconds, _ in outcome.gaps) / tokens if tokens else None


def summarise(load: Load, limits: Limits) -> Summary:
    """The numbers of a load. Requests that failed or were cancelled count in no latency, but their tokens count."""
    outcomes = load.outcomes
    done = [outcome for outcome in outcomes if outcome.succeeded]
    ttft = [outcome.first - outcome.intended for outcome in done if outcome.first is not None]
    e2e = [outcome.ended - outcome.intended for outcome in done]
    itl = inter_token_seconds(done)
    tpot = [seconds for seconds in map(time_per_output_token, done) if seconds is not None]
    tokens = sum(outcome.output_tokens for outcome in outcomes)
    good = sum(_is_good(outcome, limits) for outcome in done)
    return Summary(
        requests=len(outcomes),
        errors=sum(outcome.error is not None for outcome in outcomes),
        cancelled=sum(outcome.cancelled for outcome in outcomes),
        seconds=load.seconds,
        output_tokens=tokens,
        mean_output_tokens=_mean(outcome.output_tokens for outcome in done),
        mean_prompt_tokens=_mean(outcome.prompt_tokens for outcome in done),
        mean_cached_tokens=_mean(outcome.cached_tokens for outcome in done),
        counted_by="+".join(sorted({outcome.counted_by for outcome in done})),
        output_tokens_per_second=tokens / load.seconds,
        requests_per_second=len(done) / load.seconds,
        goodput=good / load.seconds,
        good_share=good / len(outcomes),
        ttft_samples=len(ttft),
        ttft_p50=percentile(ttft, 0.5),
        ttft_p99=tail(ttft),
        itl_samples=len(itl),
        itl_p50=percentile(itl, 0.5),
        itl_p99=tail(itl),
        tpot_p50=percentile(tpot, 0.5),
        e2e_p50=percentile(e2e, 0.5),
        e2e_p99=tail(e2e),
        client_cpu_share=load.cpu_seconds / load.seconds,
    )


@dataclass(frozen=True, slots=True)
class Spread:
    """One number over the rounds."""

    median: float
    least: float
    most: float
    rounds: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Median, least and most of the rounds that have the number; None where none has."""
    known = [value for value in values if value is not None]
    return Spread(median(known), min(known), max(known), len(known)) if known else None


def _is_good(outcome: Outcome, limits: Limits) -> bool:
    tpot = time_per_output_token(outcome) or 0.0
    return outcome.first is not None and outcome.first - outcome.intended <= limits.ttft and tpot <= limits.tpot


def _mean(values: Iterable[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None

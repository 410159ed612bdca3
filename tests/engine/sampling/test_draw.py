"""The draws, of a row and of a device's rows, against a full sort in float64, where the prefilter is enough and where
it is not."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from test_sampler import sequence
from transformers import MinPLogitsWarper

from engine.api.sampling import SamplingParams
from engine.sampling.device import exact_draw
from engine.sampling.device.filters import make_filters
from engine.sampling.draw import WIDTHS, draw, most_likely
from engine.sampling.noise import uniform

VOCABULARY = 49152
GOLDEN = [0.13870941014555427, 0.4260895671724, 0.656413707073071]
ROWS = 24
SHAPES = {"flat": 0.0, "nearly flat": 0.05, "wide": 1.0, "peaked": 8.0}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.95003},
    {"top_p": 0.3},
    {"top_k": 40},
    {"top_k": 3000},
    {"top_k": 2000, "top_p": 0.9003},
    {"temperature": 0.4},
]
MIN_P_SETTINGS: list[dict[str, Any]] = [
    {"min_p": 0.5},
    {"min_p": 0.01},
    {"min_p": 0.2, "temperature": 0.4},
    {"min_p": 0.3, "top_k": 3000},
    {"min_p": 0.03, "top_k": 3000, "top_p": 0.3},
    {"min_p": 0.03, "top_k": 40, "top_p": 0.9003},
]


def oracle(row: torch.Tensor, point: float, params: SamplingParams) -> tuple[int, float]:
    """The token by a full stable sort, and how far the point lies from the next token's border (share of the mass)."""
    scores = (row - row.max()) / params.temperature
    best, ids = scores.sort(descending=True, stable=True)
    weights = best.double().exp()[: params.top_k or None]
    share = weights / weights.sum()
    if params.top_p < 1:
        share = share[: int((share.cumsum(-1) < params.top_p).sum()) + 1]
    kept = MinPLogitsWarper(params.min_p)(torch.empty(0), best[None, : len(share)])
    share = share[kept[0].isfinite()]
    share = share / share.sum()
    borders = share.cumsum(-1)
    place = min(int((borders <= point).sum()), len(share) - 1)
    return int(ids[place]), float((borders - point).abs().min())


@pytest.mark.parametrize("spread", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_the_draw_equals_a_full_sort(spread: float, sampling: dict[str, Any]) -> None:
    compare_with_a_full_sort(spread, sampling)


@pytest.mark.parametrize("shape", ["wide", "peaked"])
@pytest.mark.parametrize("sampling", MIN_P_SETTINGS, ids=str)
def test_min_p_cuts_before_within_and_beyond_the_prefilter(shape: str, sampling: dict[str, Any]) -> None:
    compare_with_a_full_sort(SHAPES[shape], sampling)


def compare_with_a_full_sort(spread: float, sampling: dict[str, Any]) -> None:
    logits = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(1)) * spread
    rnd = random.Random(2)
    points = [rnd.random() for _ in range(ROWS - 2)] + [0.0, 1 - 2.0**-53]
    owner = sequence(**sampling)
    on_device = exact_draw.draw(logits, make_filters([owner] * ROWS, VOCABULARY, logits.device), points)
    params = owner.request.sampling
    compared = 0
    for row, point, token in zip(logits, points, on_device, strict=True):
        expected, distance = oracle(row, point, params)
        # A point this close to a border may fall on either side by the rounding of the row's mass.
        if distance > 1e-6:
            assert token == expected
            assert draw(row.numpy(), params, point) == expected
            compared += 1
    assert compared > ROWS // 2


def test_a_point_in_the_tail_is_drawn_by_a_full_sort() -> None:
    """Half of the mass lies beyond the prefilter: a draw from the prefilter alone would never leave it."""
    row = torch.cat([torch.full((WIDTHS[-1],), 1.0), torch.full((VOCABULARY - WIDTHS[-1],), -2.0)])
    owner, points = sequence(), [0.01, 0.99]
    filters = make_filters([owner] * 2, VOCABULARY, row.device)
    inside, outside = exact_draw.draw(row.expand(2, -1), filters, points)
    assert inside < WIDTHS[-1] <= outside
    assert [draw(row.numpy(), owner.request.sampling, point) for point in points] == [inside, outside]


@pytest.mark.parametrize("count", [1, 3, 64, 1000, 20011])
@pytest.mark.parametrize("levels", [1, 7, 10**6])
def test_the_most_likely_have_all_that_equal_them(count: int, levels: int) -> None:
    values = np.random.default_rng(count).integers(0, levels, count).astype(np.float32)
    for width in (1, 2, 20, 65):
        found = most_likely(values, width)
        least = np.sort(values)[-min(width, count)]
        assert (np.diff(found) > 0).all()
        assert set(np.flatnonzero(values >= least)) <= set(found)


def test_uniform_numbers_are_spread_evenly_and_do_not_depend_on_their_neighbours() -> None:
    numbers = [
        uniform(seed, candidate, position) for seed in range(20) for candidate in range(5) for position in range(50)
    ]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    counts = torch.histc(torch.tensor(numbers, dtype=torch.float64), bins=20, min=0, max=1)
    assert float(((counts - 250) ** 2 / 250).sum()) < 60
    pairs = torch.corrcoef(torch.tensor([numbers[:-1], numbers[1:]]))
    assert abs(float(pairs[0, 1])) < 0.05


def test_uniform_numbers_are_the_same_on_every_machine() -> None:
    # Written down, because a seed promises the same text across versions.
    assert [uniform(0, 0, 0), uniform(42, 1, 17), uniform(-1, 0, 3)] == GOLDEN
    assert uniform(2**64 + 42, 1, 17) == uniform(42, 1, 17)

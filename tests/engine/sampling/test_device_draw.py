"""The choice of a whole batch against the draw of each row, with nothing in between that waits for the device."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from support.recording import capture_rules
from test_sampler import sequence

from engine.sampling.device.device_draw import BEYOND, NOT_FINITE, WIDTH, Kind, choose
from engine.sampling.device.exact_draw import draw
from engine.sampling.device.filters import make_filters

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
EVERYTHING = Kind()
ROWS = 60


def settings(rows: list[dict[str, Any]], points: list[float], vocab_size: int) -> torch.Tensor:
    return torch.tensor(
        [
            [row["temperature"], min(row["top_k"] or vocab_size, vocab_size), row["top_p"], row["min_p"], point]
            for row, point in zip(rows, points, strict=True)
        ],
        dtype=torch.float64,
    )


def chosen(
    scores: torch.Tensor, rows: list[dict[str, Any]], points: list[float], kind: Kind = EVERYTHING, width: int = WIDTH
) -> list[list[int]]:
    inputs = settings(rows, points, scores.shape[1])
    with capture_rules():
        found = choose(scores, inputs, kind, width)
    result: list[list[int]] = found.tolist()
    return result


def reference(scores: torch.Tensor, row: dict[str, Any], point: float) -> int:
    if row["temperature"] == 0:
        return int(scores.argmax())
    return draw(scores[None], make_filters([sequence(**row)], len(scores), scores.device), [point])[0]


def random_rows(rnd: random.Random) -> list[dict[str, Any]]:
    return [
        {
            "temperature": rnd.choice([0.0, 0.3, 1.0, 1.0, 1.7]),
            "top_k": rnd.choice([0, 0, 1, 5, 40, 64, 65, 300, 10**9]),
            "top_p": rnd.choice([1.0, 1.0, 0.95, 0.5, 0.01, 0.0]),
            "min_p": rnd.choice([0.0, 0.0, 0.05, 0.5, 1.0]),
        }
        for _ in range(ROWS)
    ]


@pytest.mark.parametrize("spread", [0.0, 0.05, 1.0, 4.0])
@pytest.mark.parametrize("levels", [None, 6])
@pytest.mark.parametrize("vocab_size", [12800, 4160, 5003, 320, WIDTH - 1, 40])
def test_a_row_that_is_not_marked_has_the_token_of_the_draw(vocab_size: int, levels: int | None, spread: float) -> None:
    """Of any settings, whether many scores are equal or not."""
    rnd = random.Random(vocab_size + (levels or 0))
    scores = torch.randn(ROWS, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * spread
    if levels:
        scores = (scores * levels / 4).round() * 4 / levels
    rows, points = random_rows(rnd), [rnd.choice([rnd.random(), 0.0, 1 - 2.0**-53, 0.5]) for _ in range(ROWS)]
    found, certain = chosen(scores, rows, points), 0
    for (token, marks), row, point, score in zip(found, rows, points, scores, strict=True):
        assert 0 <= token < vocab_size
        if marks:
            assert marks == BEYOND
            assert row["temperature"] > 0
            assert vocab_size > WIDTH
        else:
            assert token == reference(score, row, point)
            certain += 1
    assert certain > ROWS // 10
    if vocab_size <= WIDTH:
        assert certain == ROWS


def test_what_a_trained_model_knows_is_hardly_ever_marked() -> None:
    scores = torch.randn(200, 12800, generator=torch.Generator().manual_seed(1)) * 5
    points = [random.Random(i).random() for i in range(200)]
    found = chosen(scores, [{"temperature": 0.8, **OFF, "top_p": 0.95}] * 200, points)
    assert sum(marks for _, marks in found) < 20


def test_top_k_within_the_width_needs_no_mass_of_the_whole_row() -> None:
    scores = torch.randn(50, 12800, generator=torch.Generator().manual_seed(1)) / 5
    rows = [{"temperature": 1.0, **OFF, "top_k": 1 + i % (WIDTH - 1), "top_p": (1.0, 0.9)[i % 2]} for i in range(50)]
    points = [random.Random(i).random() for i in range(50)]
    found = chosen(scores, rows, points, Kind(whole_mass=False, min_p=False))
    assert found == chosen(scores, rows, points)
    assert [token for token, _ in found] == [reference(*each) for each in zip(scores, rows, points, strict=True)]
    assert not any(marks for _, marks in found)


def test_more_tokens_can_be_ranked() -> None:
    scores = torch.randn(50, 40000, generator=torch.Generator().manual_seed(1)) / 5
    rows = [{"temperature": 1.0, **OFF, "top_k": 70 + i} for i in range(50)]
    points = [random.Random(i).random() for i in range(50)]
    found = chosen(scores, rows, points, width=130)
    assert [token for token, _ in found] == [reference(*each) for each in zip(scores, rows, points, strict=True)]
    assert all(marks == BEYOND for _, marks in chosen(scores, rows, points))


@pytest.mark.parametrize("vocab_size", [128 * 70, 5003])
@pytest.mark.parametrize("draws", [False, True])
def test_greedy_takes_the_lowest_id_among_equals(vocab_size: int, draws: bool) -> None:
    scores = torch.zeros(3, vocab_size)
    scores[0, [700, 130, 4000]] = 2.0
    scores[1, vocab_size - 1] = 1.0
    found = chosen(scores, [{"temperature": 0.0, **OFF}] * 3, [0.0] * 3, Kind(draws))
    assert found == [[130, 0], [vocab_size - 1, 0], [0, 0]]


@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_finite_maximum_are_marked_alone(draws: bool, temperature: float) -> None:
    scores = torch.randn(4, 128 * 70, generator=torch.Generator().manual_seed(1)) * 9
    scores[0, 200] = math.nan
    scores[1, 300] = math.inf
    scores[2] = -math.inf
    found = chosen(scores, [{"temperature": temperature, **OFF, "min_p": 0.1}] * 4, [0.3] * 4, Kind(draws))
    assert [bool(marks & NOT_FINITE) for _, marks in found] == [True, True, True, False]
    assert all(0 <= token < 128 * 70 for token, _ in found)


@pytest.mark.parametrize("min_p", [0.0, 0.5])
def test_the_smallest_temperature_is_greedy(min_p: float) -> None:
    """It is zero as a float32."""
    scores = torch.randn(1, 128 * 70, generator=torch.Generator().manual_seed(1))
    row = {"temperature": 1e-60, **OFF, "min_p": min_p}
    assert chosen(scores, [row], [0.3]) == [[int(scores.argmax()), 0]]
    assert reference(scores[0], row, 0.3) == int(scores.argmax())

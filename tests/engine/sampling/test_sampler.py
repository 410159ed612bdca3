"""The sampler as a whole: statistics, seeds, mixed batches, filters, logprobs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.constraints.masks import Mask, all_but, only
from engine.sampling import BatchSampler
from engine.sampling.draw import WIDTHS
from engine.sampling.logprobs import LOWEST_LOGPROB
from engine.scheduling.contracts import Sampled
from engine.scheduling.sequence import Sequence


def sequence(sampled: tuple[int, ...] = (), candidate: int = 0, position: int = 1, **sampling: Any) -> Sequence:
    """One whose prompt has ``position`` tokens; ``sampling`` are the parameters under test."""
    prompt = (0,) * position
    request = Request(id="r", prompt=prompt, sampling=SamplingParams(max_tokens=8, **sampling))
    return Sequence(request=request, candidate=candidate, tokens=[*prompt, *sampled])


def sample_rows(
    logits: torch.Tensor, sequences: list[Sequence], masks: list[Mask | None] | None = None
) -> list[Sampled]:
    return BatchSampler().sample(logits, sequences, masks or [None] * len(sequences))


def sample(logits: torch.Tensor, sequences: list[Sequence], masks: list[Mask | None] | None = None) -> list[int]:
    return [sampled.token_id for sampled in sample_rows(logits, sequences, masks)]


def draws(row: torch.Tensor, count: int, **sampling: Any) -> list[int]:
    """``count`` tokens from one row, each at another position."""
    owners = [sequence(position=position, **sampling) for position in range(1, count + 1)]
    return sample(row.expand(count, -1), owners)


def chi_square(tokens: list[int], probabilities: torch.Tensor) -> float:
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    alive = expected > 0
    assert counts[~alive].sum() == 0, "a token of probability zero was drawn"
    return float(((counts - expected)[alive] ** 2 / expected[alive]).sum())


def bound(degrees: int) -> float:
    """What chi-square exceeds about once in a million (Wilson and Hilferty's cube approximation, z = 4.8)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.8 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.fixture
def row() -> torch.Tensor:
    return torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(row: torch.Tensor, temperature: float) -> None:
    expected = (row / temperature).softmax(-1)
    assert chi_square(draws(row, 4000, temperature=temperature, seed=5), expected) < bound(39)


def test_draws_follow_the_distribution_that_top_k_and_top_p_leave(row: torch.Tensor) -> None:
    probabilities, order = row.softmax(-1).sort(descending=True)
    ten = probabilities[:10] / probabilities[:10].sum()
    kept = int((ten.cumsum(-1) < 0.8).sum()) + 1
    expected = torch.zeros_like(row)
    expected[order[:kept]] = ten[:kept] / ten[:kept].sum()
    tokens = draws(row, 4000, top_k=10, top_p=0.8, seed=9)
    assert set(tokens) == set(order[:kept].tolist())
    assert chi_square(tokens, expected) < bound(kept - 1)


def test_draws_follow_the_distribution_of_transformers(row: torch.Tensor) -> None:
    """All that transformers has too, in the order in which its ``generate`` applies it."""
    said = (int(row.argmax()), 7)
    scores = row[None]
    for processor in (
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(1.5),
        TopKLogitsWarper(25),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.4),
    ):
        scores = processor(torch.tensor([[0, *said]]), scores)
    settings = {"repetition_penalty": 1.3, "temperature": 1.5, "top_k": 25, "top_p": 0.9, "min_p": 0.4}
    owners = [sequence(said, position=position, seed=9, **settings) for position in range(1, 4001)]
    tokens = sample(row.expand(4000, -1), owners)
    kept = int(scores.isfinite().sum())
    assert 5 < kept < 20
    assert len(set(tokens)) == kept
    assert chi_square(tokens, scores[0].softmax(-1)) < bound(kept - 1)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    logits = torch.randn(12, 3000, generator=torch.Generator().manual_seed(1)) * 3
    owners = [
        sequence(
            (7, 7, 9),
            candidate=i % 3,
            seed=i,
            temperature=(0.0, 0.7, 1.5)[i % 3],
            logprobs=(None, 5)[i % 2],
            top_k=(0, 40, 2000)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
            min_p=(0.0, 0.0, 0.0, 0.1)[i % 4],
            repetition_penalty=(1.0, 1.0, 1.2)[i % 3],
            frequency_penalty=(0.0, 0.5)[i % 2],
        )
        for i in range(12)
    ]
    together = sample_rows(logits, owners)
    alone = [sample_rows(logits[i : i + 1], [owner])[0] for i, owner in enumerate(owners)]
    assert together == alone
    backwards = sample_rows(logits.flip(0), owners[::-1])
    assert backwards[::-1] == alone


def test_the_seed_the_candidate_and_the_position_each_change_the_draw(row: torch.Tensor) -> None:
    flat = torch.zeros(1, 4096)
    base = sample(flat, [sequence(seed=1)])
    assert base == sample(flat, [sequence(seed=1)])
    others = [sequence(seed=2), sequence(seed=1, candidate=1), sequence(seed=1, position=2)]
    assert all(sample(flat, [other]) != base for other in others)


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 1.0, 5.0, 5.0]])
    assert sample(logits, [sequence(temperature=0.0)] * 2) == [1, 0]


def test_greedy_and_sampled_rows_share_a_batch(row: torch.Tensor) -> None:
    best = int(row.argmax())
    owners = [sequence(temperature=0.0), sequence(seed=4), sequence(temperature=0.0)]
    tokens = sample(row.expand(3, -1), owners)
    assert (tokens[0], tokens[2]) == (best, best)
    assert tokens[1] == sample(row[None], [owners[1]])[0]


@pytest.mark.parametrize(
    "sampling", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-30}, {"top_k": 1, "top_p": 0.5}, {"min_p": 1.0}]
)
def test_filters_that_leave_one_token_are_greedy(row: torch.Tensor, sampling: dict[str, Any]) -> None:
    assert set(draws(row, 200, **sampling)) == {int(row.argmax())}


def test_top_k_beyond_the_vocabulary_is_off(row: torch.Tensor) -> None:
    assert draws(row, 200, top_k=10**9) == draws(row, 200)


def test_top_k_keeps_the_lowest_ids_among_equals() -> None:
    assert set(draws(torch.zeros(5000), 500, top_k=3)) == {0, 1, 2}


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    row = torch.full((5000,), -math.inf)
    row[[17, 4999]] = 1.0
    assert set(draws(row, 200)) == {17, 4999}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_fail_and_the_other_rows_succeed_alone(row: torch.Tensor, bad: float) -> None:
    logits = row.repeat(2, 1)
    logits[1, 5] = bad
    owners = [sequence(temperature=0.0), sequence()]
    with pytest.raises(FloatingPointError):
        sample_rows(logits, owners)
    assert sample(logits[:1], owners[:1]) == [int(row.argmax())]
    with pytest.raises(FloatingPointError):
        sample_rows(logits[1:], owners[1:])


def test_the_logits_handed_in_stay_as_they_are(row: torch.Tensor) -> None:
    logits = row[None].clone()
    sample_rows(logits, [sequence((1, 2), presence_penalty=1.0, logprobs=3)])
    assert torch.equal(logits[0], row)


def test_no_rows_make_no_tokens() -> None:
    assert sample_rows(torch.empty(0, 8), []) == []


def test_logprobs_are_raw_descending_and_only_for_rows_that_ask(row: torch.Tensor) -> None:
    owners = [
        sequence((3, 3), temperature=0.3, top_k=2, frequency_penalty=2.0, logprobs=4),
        sequence(),
        sequence(logprobs=0),
    ]
    asked, silent, chosen_only = sample_rows(row.expand(3, -1), owners)
    raw = row.log_softmax(-1)
    best, ids = raw.topk(4)
    assert silent.logprobs is None
    assert asked.logprobs is not None
    assert [top.token_id for top in asked.logprobs.top] == ids.tolist()
    assert [top.logprob for top in asked.logprobs.top] == pytest.approx(best.tolist(), abs=1e-6)
    assert asked.logprobs.chosen == pytest.approx(raw[asked.token_id].item(), abs=1e-6)
    assert chosen_only.logprobs is not None
    assert chosen_only.logprobs.top == ()


def test_logprobs_are_never_infinite() -> None:
    logits = torch.tensor([[0.0, -math.inf, -math.inf]])
    result: Sampled = sample_rows(logits, [sequence(temperature=0.0, logprobs=20)])[0]
    assert result.logprobs is not None
    assert [top.logprob for top in result.logprobs.top] == [0.0, LOWEST_LOGPROB, LOWEST_LOGPROB]
    assert [top.token_id for top in result.logprobs.top] == [0, 1, 2]


def test_a_repetition_penalty_that_leaves_no_finite_number_fails(row: torch.Tensor) -> None:
    """One over the least float is infinite: no token may be drawn from that."""
    with pytest.raises(FloatingPointError):
        sample(row[None], [sequence((int(row.argmax()),), repetition_penalty=1e-60)])


def test_presence_and_frequency_penalties_apply_to_the_response_alone() -> None:
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    prompt_only = sequence(temperature=0.0, presence_penalty=2.0)
    assert sample(logits, [prompt_only]) == [0]
    assert sample(logits, [sequence((0,), temperature=0.0, presence_penalty=0.2)]) == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_leaves_what_it_allows(row: torch.Tensor, temperature: float) -> None:
    best = int(row.argmax())
    owners = [sequence(position=position, temperature=temperature) for position in range(1, 201)]
    rows = row.expand(200, -1)
    assert set(sample(rows, owners, [only([3, 39], 40)] * 200)) <= {3, 39}
    assert best not in sample(rows, owners, [all_but([best], 40)] * 200)
    assert sample(rows, owners, [all_but([], 40)] * 200) == sample(rows, owners)


def test_masked_draws_follow_the_distribution_that_the_mask_leaves(row: torch.Tensor) -> None:
    allowed = list(range(0, 40, 3))
    expected = torch.zeros_like(row)
    expected[allowed] = row[allowed].softmax(-1)
    owners = [sequence(position=position, seed=2) for position in range(1, 4001)]
    tokens = sample(row.expand(4000, -1), owners, [only(allowed, 40)] * 4000)
    assert chi_square(tokens, expected) < bound(len(allowed) - 1)


def test_a_mask_touches_its_own_row_alone() -> None:
    logits = torch.randn(6, 3001, generator=torch.Generator().manual_seed(1))
    owners = [sequence(seed=i, temperature=(0.0, 1.0)[i % 2], logprobs=2) for i in range(6)]
    masks = [only([5, 3000], 3001), None, None, only(range(0, 3001, 2), 3001), None, all_but([7], 3001)]
    together = sample_rows(logits, owners, masks)
    alone = [sample_rows(logits[i : i + 1], [owners[i]], [masks[i]])[0] for i in range(6)]
    assert together == alone
    free = sample_rows(logits, owners)
    assert [together[i] for i in (1, 2, 4)] == [free[i] for i in (1, 2, 4)]


def test_logprobs_are_those_before_the_mask_and_penalties_come_after_it() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.9, 2.0]])
    owner = sequence((1,), temperature=0.0, presence_penalty=1.0, logprobs=4)
    sampled = sample_rows(logits, [owner], [only([1, 2], 4)])[0]
    raw = logits[0].log_softmax(-1)
    assert sampled.token_id == 2
    assert sampled.logprobs is not None
    assert sampled.logprobs.chosen == pytest.approx(raw[2].item(), abs=1e-6)
    assert [top.token_id for top in sampled.logprobs.top] == [0, 3, 1, 2]


def test_a_mask_that_leaves_nothing_possible_fails(row: torch.Tensor) -> None:
    with pytest.raises(FloatingPointError):
        sample(row[None], [sequence()], [only([], 40)])


def test_the_prefilter_is_smaller_than_the_vocabularies_it_is_for() -> None:
    assert WIDTHS[-1] < 49152

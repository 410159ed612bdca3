"""Penalties by their formula, and against transformers' own."""

from __future__ import annotations

import gc
import math
import random

import numpy as np
import pytest
import torch
from test_sampler import sequence
from transformers import RepetitionPenaltyLogitsProcessor

from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.sampling.device.count_table import CountTable, penalised
from engine.sampling.penalties import Penalties
from engine.scheduling.sequence import Sequence


def penalised_by(penalties: Penalties, logits: torch.Tensor, owners: list[Sequence]) -> torch.Tensor:
    return torch.from_numpy(penalties.apply(logits.numpy(), owners))


def test_the_formula() -> None:
    logits = torch.arange(12.0).view(2, 6)
    owners = [
        sequence((1, 1, 4), presence_penalty=0.5, frequency_penalty=0.25),
        sequence((5,), frequency_penalty=-1.0),
    ]
    expected = logits.clone()
    expected[0, 1] -= 0.5 + 2 * 0.25
    expected[0, 4] -= 0.5 + 0.25
    expected[1, 5] += 1.0
    assert torch.equal(penalised_by(Penalties(), logits, owners), expected)


def test_nothing_to_penalise_costs_no_copy() -> None:
    logits = np.zeros((2, 6), np.float32)
    assert Penalties().apply(logits, [sequence((1,)), sequence(presence_penalty=1.0)]) is logits


@pytest.mark.parametrize("penalty", [1.1, 0.7, 30.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    """Of prompt and answer, at each step of an answer, also where a mask left a token no probability."""
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(500, (40,), generator=generator).tolist() for _ in range(4)]
    owners = [
        Sequence(Request("r", tuple(prompt), SamplingParams(8, repetition_penalty=penalty)), 0, [*prompt])
        for prompt in prompts
    ]
    penalties, reference = Penalties(), RepetitionPenaltyLogitsProcessor(penalty)
    for _ in range(5):
        logits = torch.randn(4, 500, generator=generator) * 5
        logits[:, ::7] = -math.inf
        expected = reference(torch.tensor([owner.tokens for owner in owners]), logits.clone())
        assert torch.equal(penalised_by(penalties, logits, owners), expected)
        for owner in owners:
            owner.tokens += torch.randint(500, (3,), generator=generator).tolist()


def test_the_repetition_penalty_comes_first_and_the_others_do_not_count_the_prompt() -> None:
    owner = sequence((3, 3), repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    other = sequence((0,), presence_penalty=1.0)  # its prompt and its answer are token 0
    logits = torch.tensor([[4.0, 4.0, 4.0, -4.0], [4.0, 4.0, 4.0, 4.0]])
    expected = [[2.0, 4.0, 4.0, -8.0 - 0.5 - 0.5], [3.0, 4.0, 4.0, 4.0]]
    assert penalised_by(Penalties(), logits, [owner, other]).tolist() == expected


def test_rows_come_and_go() -> None:
    """A sequence is penalised alike, whatever was sampled beside it before and however many steps it missed."""
    penalties = Penalties()
    owners = [sequence((n, n, 9), repetition_penalty=1.0 + n % 2, frequency_penalty=0.5) for n in range(6)]
    for step in range(6):
        batch = owners[step % 3 :: 2]
        logits = torch.randn(len(batch), 16, generator=torch.Generator().manual_seed(step))
        assert torch.equal(penalised_by(penalties, logits, batch), penalised_by(Penalties(), logits, batch))
        for owner in batch:
            owner.tokens.append(step)


def test_counts_do_not_outlive_their_sequence() -> None:
    penalties = Penalties()
    owners = [sequence((1,), presence_penalty=1.0) for _ in range(3)]
    penalised_by(penalties, torch.zeros(3, 4), owners)
    assert len(penalties._counts) == 3
    del owners[1:]
    gc.collect()
    assert len(penalties._counts) == 1


def on_device(table: CountTable, logits: torch.Tensor, owners: list[Sequence], pending: list[int]) -> torch.Tensor:
    """What ``Penalties.apply`` returns, by counts that stay on the device; ``pending`` tokens are -1 where known."""
    sampling = [owner.request.sampling for owner in owners]
    settings = [[s.repetition_penalty, s.presence_penalty, s.frequency_penalty] for s in sampling]
    update = [torch.tensor(part, dtype=torch.long) for part in table.missing(owners)]
    newest = torch.tensor(pending)[:, None]
    return penalised(logits, table.entries(owners, update), torch.tensor(settings, dtype=torch.float64), newest)


def test_counts_on_the_device_make_the_same_numbers() -> None:
    """Bit for bit, while rows come, go and are taken back, and for tokens that only the device knows."""
    rnd, table = random.Random(4), CountTable(300, torch.device("cpu"))

    def new() -> Sequence:
        return sequence(
            tuple(rnd.randrange(30) for _ in range(rnd.randrange(9))),
            position=rnd.randrange(1, 4),
            repetition_penalty=rnd.choice([1.0, 1.3, 0.7]),
            presence_penalty=rnd.choice([0.0, 0.7, -1.1]),
            frequency_penalty=rnd.choice([0.1, 0.3]),
        )

    owners = [new() for _ in range(5)]
    for step in range(60):
        batch = rnd.sample(owners, rnd.randrange(1, 6))
        logits = torch.randn(len(batch), 300, generator=torch.Generator().manual_seed(step)) * 4
        logits[:, ::7] = -math.inf
        pending = [rnd.choice([-1, rnd.randrange(30)]) for _ in batch]
        known = [
            Sequence(owner.request, 0, owner.tokens + [token] * (token >= 0))
            for owner, token in zip(batch, pending, strict=True)
        ]
        assert torch.equal(on_device(table, logits, batch, pending), penalised_by(Penalties(), logits, known))
        for owner in batch:
            owner.tokens += [rnd.randrange(30) for _ in range(rnd.randrange(3))]
        if step % 5 == 0:
            owners[rnd.randrange(5)] = new()
            back = rnd.choice(owners)
            del back.tokens[back.num_prompt + rnd.randrange(1 + back.num_sampled) :]
    gc.collect()
    assert len(table._table) <= 8

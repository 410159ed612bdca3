"""Penalties by their formula."""

from __future__ import annotations

import torch
from test_sampler import sequence

from engine.sampling.penalties import penalised


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
    assert torch.equal(penalised(logits, owners), expected)


def test_nothing_to_penalise_costs_no_copy() -> None:
    logits = torch.zeros(2, 6)
    assert penalised(logits, [sequence((1,)), sequence(presence_penalty=1.0)]) is logits

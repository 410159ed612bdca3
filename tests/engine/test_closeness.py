"""How far apart numbers are."""

from __future__ import annotations

from math import inf, nan

import torch

from engine.closeness import difference


def test_differences_are_shares_of_the_largest_number() -> None:
    expected = torch.tensor([4.0, -8.0, 0.0])
    assert difference(expected, expected) == 0
    assert difference(torch.tensor([4.0, -8.0, 2.0]), expected) == 0.25
    assert difference(torch.zeros(3), torch.zeros(3)) == 0
    assert difference(torch.tensor([nan, -8.0, 0.0]), expected) == inf
    assert difference(expected, torch.tensor([nan, -8.0, 0.0])) == inf
    assert difference(expected[:2], expected) == inf

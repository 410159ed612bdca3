"""Which masks of transformers are causal, also where they look tokens up in tables."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import masking_utils as masks

from engine.api.errors import ModelRefused
from engine.model.attention_hook import _examined_mask

WINDOW = 1000
TEXT = torch.full((1, 4), -1)
"""Of the four tokens of a dry run, none lies in an image."""
IMAGE = torch.tensor([[-1, 0, 0, -1]])


def _examine(function: Callable[..., Any]) -> int:
    config = SimpleNamespace(sliding_window=WINDOW)
    return int(_examined_mask(mask_function=function, config=config, device=torch.device("cpu")).item())


def test_a_table_of_text_changes_no_mask() -> None:
    spans = masks.blockwise_overlay(TEXT)
    assert _examine(masks.or_masks(masks.causal_mask_function, spans)) == 0
    windowed = masks.and_masks(masks.or_masks(masks.causal_mask_function, spans), masks.sliding_window_overlay(WINDOW))
    assert _examine(windowed) == WINDOW


@pytest.mark.parametrize(
    "function",
    [
        masks.or_masks(masks.causal_mask_function, masks.blockwise_overlay(IMAGE)),
        # All tokens of the dry run in one span that sees itself.
        masks.or_masks(masks.causal_mask_function, masks.blockwise_overlay(torch.zeros(1, 4, dtype=torch.long))),
        masks.and_masks(masks.causal_mask_function, masks.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1]]))),
        masks.and_masks(masks.causal_mask_function, masks.sliding_window_overlay(WINDOW - 1)),
        masks.chunked_causal_mask_function(WINDOW, torch.zeros(1, dtype=torch.long)),
        masks.bidirectional_mask_function,
    ],
    ids=["span", "only-span", "packed", "other-window", "chunks", "two-way"],
)
def test_masks_that_see_more_or_less_are_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(ModelRefused, match="attention mask"):
        _examine(function)

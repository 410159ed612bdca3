"""Which masks of transformers are causal, also where they look tokens up in tables."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import masking_utils as masks

from engine.api.block_groups import Window
from engine.api.errors import ModelRefused
from engine.model.attention_hook import _examined_mask, window_of

WINDOW, CHUNK = 1000, 300
TEXT = torch.full((1, 4), -1)
"""Of the four tokens of a dry run, none lies in an image."""
IMAGE = torch.tensor([[-1, 0, 0, -1]])


def _examine(function: Callable[..., Any]) -> Window | None:
    config = SimpleNamespace(sliding_window=WINDOW, attention_chunk_size=CHUNK)
    return window_of(_examined_mask(mask_function=function, config=config, device=torch.device("cpu")))


def _chunks_of(size: int) -> Callable[..., Any]:
    function: Callable[..., Any] = masks.chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long))
    return function


def test_a_table_of_text_changes_no_mask() -> None:
    spans = masks.blockwise_overlay(TEXT)
    assert _examine(masks.or_masks(masks.causal_mask_function, spans)) is None
    windowed = masks.and_masks(masks.or_masks(masks.causal_mask_function, spans), masks.sliding_window_overlay(WINDOW))
    assert _examine(windowed) == Window(WINDOW)


def test_a_mask_that_hides_everything_may_be_made_but_no_layer_may_use_it() -> None:
    nothing = masks.sliding_window_causal_mask_function(0)
    config = SimpleNamespace(sliding_window=0)
    mask = _examined_mask(mask_function=nothing, config=config, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="hides everything"):
        window_of(mask)


def test_chunks_are_told_from_a_window() -> None:
    assert _examine(_chunks_of(CHUNK)) == Window(CHUNK, chunked=True)
    with pytest.raises(ValueError, match="not made by transformers"):
        window_of(torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize(
    "function",
    [
        masks.or_masks(masks.causal_mask_function, masks.blockwise_overlay(IMAGE)),
        # All tokens of the dry run in one span that sees itself.
        masks.or_masks(masks.causal_mask_function, masks.blockwise_overlay(torch.zeros(1, 4, dtype=torch.long))),
        masks.and_masks(masks.causal_mask_function, masks.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1]]))),
        masks.and_masks(masks.causal_mask_function, masks.sliding_window_overlay(WINDOW - 1)),
        _chunks_of(WINDOW),
        masks.bidirectional_mask_function,
    ],
    ids=["span", "only-span", "packed", "other-window", "other-chunks", "two-way"],
)
def test_masks_that_see_more_or_less_are_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(ModelRefused, match="attention mask"):
        _examine(function)

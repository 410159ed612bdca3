"""Queries that grow with their position: the layers of Llama 4 that do not rotate.

transformers' module counts the positions of a forward's rows from 0, which is right for one text computed at once. Here
a forward has the tokens of many sequences, so that part of the module is switched off on its instance, and queries are
scaled by the positions that the model was given: log(1 + floor((position + 1) / floor)) * strength + 1.
Nakanishi, "Scalable-Softmax Is Superior for Attention", 2025.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from engine.api.errors import ModelRefused
from engine.attention.base import AttentionOptions
from engine.closeness import ROUNDING, difference
from engine.model import attention_hook
from engine.model.architecture import ATTENTION, QUERY_SCALE
from engine.model.probe import attending_to_itself, set_attention

_TOKENS = 5
_SHORT_FLOOR = 2  # with which the scale differs within a few tokens


class QueryScale:
    """Stands around the attention of one layer; ``positions`` [1, tokens] are those of the step."""

    def __init__(self, floor: float, strength: float) -> None:
        self.floor = floor
        self._strength = strength
        self.positions = torch.empty(1, 0)

    def __call__(
        self,
        state: attention_hook.LayerState,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        options: AttentionOptions,
    ) -> torch.Tensor:
        steps = torch.floor((self.positions.float() + 1.0) / self.floor)
        scale = (torch.log1p(steps) * self._strength + 1.0)[:, None, :, None]
        return state((query * scale).to(query.dtype), key, value, attention_mask, options)


def scale_queries(model: Any, *, proves: bool = True) -> None:
    """Have the layers of ``model`` that scale queries do so by the positions of the step.

    Raises ``ModelRefused`` where a layer's own numbers for a text computed at once are others. Nothing ``proves`` a
    model whose weights have no values.
    """
    switch, floor, strength, rotates = QUERY_SCALE
    set_attention(model, attention_hook.PAGED)
    for name, layer in model.named_modules():
        attention = getattr(layer, ATTENTION, None)
        if not getattr(attention, switch, False) or getattr(attention, rotates):
            continue
        scale = QueryScale(getattr(attention, floor), getattr(attention, strength))
        own = _queries(model, attention, floor) if proves else None
        setattr(attention, switch, False)
        attention_hook.surround(attention, scale)
        layer.register_forward_pre_hook(partial(_note_positions, scale), with_kwargs=True)
        if own is not None:
            scale.positions = torch.arange(_TOKENS, device=own.device)[None]
            kept, scale.floor = scale.floor, _SHORT_FLOOR
            ours = _queries(model, attention, floor)
            scale.floor = kept
            if not difference(ours, own) <= ROUNDING[own.dtype]:
                raise ModelRefused(f"layer {name} scales its queries by their positions in a way that is not known")


def _queries(model: Any, attention: Any, floor: str) -> torch.Tensor:
    """The queries of a few tokens, with a short floor."""
    size = model.config.get_text_config().hidden_size
    seeded = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _TOKENS, size, generator=seeded).to(model.device, model.dtype)
    kept = getattr(attention, floor)
    setattr(attention, floor, _SHORT_FLOOR)
    try:
        with attending_to_itself(attention) as calls, torch.inference_mode():
            attention(hidden, position_embeddings=None, attention_mask=None)
    finally:
        setattr(attention, floor, kept)
    query: torch.Tensor = calls[0][0]
    return query


def _note_positions(scale: QueryScale, _layer: Any, _args: Any, keywords: dict[str, Any]) -> None:
    scale.positions = keywords["position_ids"]

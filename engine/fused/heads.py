"""Fuses the norms of query and key heads with their rotation, in attentions that have such norms.

An attention's ``forward`` is replaced by one for the usual order: products, norms, rotation, attention, product.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

import torch

from engine.attention.base import AttentionOptions
from engine.closeness import ROUNDING, difference
from engine.fused.ops import FusedNorm, rotated
from engine.model import attention_hook
from engine.model.architecture import ATTENTION_PARTS, HEAD_NORMS
from engine.model.loader import LoadedModel
from engine.model.probe import attending_to_itself, dry_run


@dataclass(frozen=True, slots=True)
class AttentionPlace:
    """An attention, what it asks of its backend, and what it is called with beside hidden states [1, tokens, size]."""

    attention: Any
    options: AttentionOptions
    inputs: dict[str, Any]


class FuseHeads:
    """The ``Rewrite`` of attentions whose norms of heads are fused already."""

    name = "attentions with norms of heads"
    tolerance = ROUNDING

    def find(self, model: LoadedModel) -> list[AttentionPlace]:
        found = {}
        for layer in model.probe.layers:
            attention = model.module.get_submodule(layer.name)
            parts = dict(attention.named_children())
            if parts.keys() == ATTENTION_PARTS | HEAD_NORMS and "forward" not in vars(attention):
                norms = [parts["q_norm"], parts["k_norm"]]
                fused = all(isinstance(norm, FusedNorm) and len(norm.weight) == layer.shape.key_size for norm in norms)
                if fused and len({(norm.eps, norm.offset, norm.round_first) for norm in norms}) == 1:
                    found[attention] = layer.options
        if not found:
            return []
        inputs: dict[Any, dict[str, Any]] = {}
        handles = [
            attention.register_forward_pre_hook(
                lambda attention, _args, named: inputs.update({attention: dict(named)}), with_kwargs=True
            )
            for attention in found
        ]
        dry_run(model.module, handles)
        return [
            AttentionPlace(
                attention,
                options,
                {name: value for name, value in inputs[attention].items() if name != "hidden_states"},
            )
            for attention, options in found.items()
            if {"hidden_states", "position_embeddings"} <= inputs[attention].keys()
        ]

    def stand_ins(self, place: AttentionPlace) -> list[FusedAttention]:
        return [FusedAttention(place)]

    def compare(self, place: AttentionPlace, stand_in: FusedAttention) -> tuple[float, torch.dtype]:
        """The largest difference of queries, keys, values and results."""
        weight = place.attention.q_proj.weight
        numbers = torch.randn(1, 4, weight.shape[1], generator=torch.Generator().manual_seed(0))
        hidden = numbers.to(weight.device, weight.dtype)
        with torch.inference_mode(), attending_to_itself(place.attention) as calls:
            expected = place.attention(hidden_states=hidden, **place.inputs)
            found = stand_in(hidden_states=hidden, **place.inputs)
        (*theirs, _mask, options), (*ours, _, our_options) = calls
        same = all(one is other or one == other for one, other in zip(options, our_options, strict=True))
        if not same or not isinstance(expected, tuple) or len(expected) != len(found):
            return inf, weight.dtype
        pairs = zip([*ours, found[0]], [*theirs, expected[0]], strict=True)
        return max(difference(one, other) for one, other in pairs), weight.dtype

    def swap(self, place: AttentionPlace, stand_in: FusedAttention) -> None:
        place.attention.forward = stand_in


class FusedAttention:
    """What such an attention computes, with norms and rotation in one kernel."""

    def __init__(self, place: AttentionPlace) -> None:
        self._attention = place.attention
        self._options = place.options
        self._norms = place.attention.q_norm, place.attention.k_norm

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **_inputs: Any,
    ) -> tuple[torch.Tensor, None]:
        attention, tokens, size = self._attention, hidden_states.shape[1], len(self._norms[0].weight)
        # In the order of the model's own calls, which a group of linear layers counts on.
        products = [project(hidden_states) for project in (attention.q_proj, attention.k_proj, attention.v_proj)]
        query, key, value = (product.view(1, tokens, -1, size).transpose(1, 2) for product in products)
        query, key = rotated(query, key, *position_embeddings, self._norms)
        found = attention_hook.attend(attention, query, key, value, attention_mask, self._options)
        return attention.o_proj(found.reshape(1, tokens, -1)), None

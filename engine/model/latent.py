"""Latent attention: the cache holds what keys and values are made of, not the keys and values of every head.

In DeepSeek-AI, "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model", 2024, section
2.1, a token leaves a latent c and a rotated part r, and head h has the key [K_h c, r] and the value V_h c. Both
products may as well be done on the other side of the attention: q (K_h c) = (q K_h) c for the scores, and the sum of
w V_h c is V_h times the sum of w c. So [c, r] is the one key of all heads, and c, which lies in it, the value.

transformers' own code is left alone but for the method that expands latents, which is replaced on each instance. What
cannot be proved equal stays expanded: it is slower and takes more memory, never wrong.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from engine.api.errors import ModelRefused
from engine.attention.base import AttentionOptions
from engine.closeness import REORDERED_SUMS, difference
from engine.model import attention_hook
from engine.model.architecture import LATENT_EXPANSION, LATENT_WEIGHTS
from engine.model.probe import Probe, ProbedLayer

_log = logging.getLogger(__name__)

_TOKENS = 5


def keep_latents(examine: Callable[[], Probe], *, proves: bool = True) -> Probe:
    """Have the layers of a model that expand latents keep the latents instead, where that is proved equal and smaller.

    ``examine`` probes the model, which is bound to no backend yet; the result is its last probe. Nothing ``proves`` a
    model whose weights have no values.
    """
    expanded = examine()
    found = [layer for layer in expanded.layers if _expands_latents(layer.module)]
    kept, reason = [], ""
    for layer in found:
        why_not = _why_not(layer, proves)
        if why_not:
            reason = f"layer {layer.name}: {why_not}"
        else:
            _swap(layer)
            kept.append(layer)
    if kept:
        try:
            expanded = examine()
        except ModelRefused as refusal:
            # Before, the model was accepted: it does something with keys or values that only expanded ones can stand.
            reason = str(refusal)
            while kept:
                _swap_back(kept.pop())
            expanded = examine()
    if found:
        _log.info("%d of %d latent attentions keep latents", len(kept), len(found))
    if reason:
        _log.warning("%d latent attentions keep expanded keys and values: %s", len(found) - len(kept), reason)
    return expanded


class AbsorbedAttention:
    """The attention of one layer over latents: absorbs its ``weights`` [heads * (nope + value size), latent size] into
    queries and results. ``nope`` is the part of a query that is not rotated and comes first."""

    def __init__(self, weights: nn.Linear, heads: int, value_size: int) -> None:
        self._weights = weights
        self._heads = heads
        self._nope = weights.out_features // heads - value_size

    def __call__(
        self,
        state: attention_hook.LayerState,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        options: AttentionOptions,
    ) -> torch.Tensor:
        # The proof at load was for what the replaced method returns; other keys or values are not what it compared.
        if value.data_ptr() != key.data_ptr() or value.shape[-1] != self._weights.in_features:
            raise ModelRefused("its attention gets other keys or values than were made of its latents")
        return self.leave(state(self.enter(query), key, value, attention_mask, options))

    def enter(self, query: torch.Tensor) -> torch.Tensor:
        """Queries [1, heads, tokens, nope + rotated] that score latents: [1, heads, tokens, latent size + rotated]."""
        absorbed = query[0, :, :, : self._nope] @ self._by_head()[:, : self._nope]
        return torch.cat([absorbed, query[0, :, :, self._nope :]], dim=-1)[None]

    def leave(self, mixed: torch.Tensor) -> torch.Tensor:
        """Values of mixed latents [1, tokens, heads, latent size]: [1, tokens, heads, value size]."""
        values = mixed[0].transpose(0, 1) @ self._by_head()[:, self._nope :].transpose(1, 2)
        return values.transpose(0, 1)[None]

    def _by_head(self) -> torch.Tensor:
        return self._weights.weight.unflatten(0, (self._heads, -1))


def _expands_latents(module: Any) -> bool:
    return callable(getattr(module, LATENT_EXPANSION, None)) and hasattr(module, LATENT_WEIGHTS)


def _as_they_are(latents: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of latents [1, 1, tokens, latent size] and their rotated part; the values lie in the keys."""
    keys = torch.cat([latents, rotated], dim=-1)
    return keys, keys[..., : latents.shape[-1]]


def _swap(layer: ProbedLayer) -> None:
    weights = getattr(layer.module, LATENT_WEIGHTS)
    setattr(layer.module, LATENT_EXPANSION, _as_they_are)
    attention_hook.surround(layer.module, AbsorbedAttention(weights, layer.shape.heads, layer.shape.value_size))


def _swap_back(layer: ProbedLayer) -> None:
    delattr(layer.module, LATENT_EXPANSION)  # that of its class
    attention_hook.surround(layer.module, None)


def _why_not(layer: ProbedLayer, proves: bool) -> str:
    """Why a layer cannot keep latents; empty if it can."""
    weights, (heads, key_size, value_size, *_) = getattr(layer.module, LATENT_WEIGHTS), layer.shape
    if type(weights) is not nn.Linear or weights.bias is not None:
        return f"its {LATENT_WEIGHTS} is not a plain product ({type(weights).__name__})"
    nope = weights.out_features // heads - value_size
    if weights.out_features % heads or not 0 < nope < key_size:
        return f"{weights.out_features} outputs are no keys and values of {heads} heads"
    numbers = weights.in_features + key_size - nope
    if numbers >= layer.shape.numbers:
        return f"latents are not smaller: {numbers} numbers for {layer.shape.numbers}"
    if not proves:
        return ""
    try:
        with torch.inference_mode():
            apart = _apart(layer, key_size - nope)
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"its {LATENT_EXPANSION} does not take latents: {error}"
    limit = REORDERED_SUMS[torch.float32]
    if not apart <= limit:
        return f"latents yield results that differ by {apart:.1e} of the largest number; rounding explains {limit:.0e}"
    return ""


def _apart(layer: ProbedLayer, rotated_size: int) -> float:
    """The difference of scores and of mixed values, on random numbers in float32, to those of the layer's own code."""
    module: Any = layer.module
    own: nn.Linear = getattr(module, LATENT_WEIGHTS)
    heads, key_size, value_size, *_ = layer.shape
    random = torch.Generator().manual_seed(0)

    def numbers(*sizes: int) -> torch.Tensor:
        return torch.randn(1, *sizes, generator=random).to(own.weight.device)

    latents, rotated = numbers(1, _TOKENS, own.in_features), numbers(1, _TOKENS, rotated_size)
    query, weights = numbers(heads, _TOKENS, key_size), numbers(heads, _TOKENS, _TOKENS)
    exact = copy.deepcopy(own).float()
    setattr(module, LATENT_WEIGHTS, exact)
    try:
        keys, values = getattr(module, LATENT_EXPANSION)(latents, rotated)
    finally:
        setattr(module, LATENT_WEIGHTS, own)
    absorbed = AbsorbedAttention(exact, heads, value_size)
    latent_keys, latent_values = _as_they_are(latents, rotated)
    return max(
        difference(absorbed.enter(query) @ latent_keys.transpose(2, 3), query @ keys.transpose(2, 3)),
        difference(absorbed.leave((weights @ latent_values).transpose(1, 2)), (weights @ values).transpose(1, 2)),
    )

"""Connects transformers' models to our attention: two registered names, one function, state on the layer.

transformers calls the function registered under a model's attention name as ``f(module, query, key, value,
attention_mask, **keywords)`` with tensors [1, heads, tokens, size] and takes back [1, tokens, heads, value size].
What to compute is an attribute of the attention module itself, so several models in one process are independent.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface

from engine.api.block_groups import Window
from engine.api.errors import ModelRefused
from engine.attention.base import AttentionBackend, AttentionOptions

# Two names, because a mask function makes transformers inspect the positions of every step. That is wanted once, at
# load: masks are examined under the probe's name, and not made at all under the paged name.
PROBE = "castor_probe"
PAGED = "castor_paged"

# Keywords that reach attention functions and do not change what this one has to compute.
INERT = frozenset(
    {
        "cache_position",
        "dropout",
        "image_sizes",
        "labels",
        "layer_idx",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
_STATE, _AROUND = "castor_layer", "castor_around"


class LayerState(Protocol):
    """What an attention module does when its model runs."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        options: AttentionOptions,
    ) -> torch.Tensor: ...


class Around(Protocol):
    """What stands between an attention module and its state, and calls it."""

    def __call__(
        self,
        state: LayerState,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        options: AttentionOptions,
    ) -> torch.Tensor: ...


class PagedLayer:
    """Attention of one layer through a backend.

    ``writes`` is False for a layer that attends to the keys and values of another one, ``layer``, which ran before.
    ``chunk_size`` is that of its mask: models do not pass it.
    """

    def __init__(
        self, backend: AttentionBackend, layer: int, *, writes: bool = True, chunk_size: int | None = None
    ) -> None:
        self._backend = backend
        self._layer = layer
        self._writes = writes
        self._chunk_size = chunk_size

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        options: AttentionOptions,
    ) -> torch.Tensor:
        assert attention_mask is None, "a mask was made after the probe had shown that none is"
        if self._writes:
            self._backend.write_kv(self._layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
        if self._chunk_size is not None:
            options = options._replace(chunk_size=self._chunk_size)
        return self._backend.attend(self._layer, query[0].transpose(0, 1), options)[None]


def bind(module: nn.Module, state: LayerState) -> None:
    """Make ``state`` compute the attention of ``module``."""
    setattr(module, _STATE, state)


def unbind(module: nn.Module) -> None:
    """Undo ``bind``; a module without state is left alone."""
    if hasattr(module, _STATE):
        delattr(module, _STATE)


def surround(module: nn.Module, around: Around | None) -> None:
    """Have ``around`` stand between ``module`` and whatever is bound to it; None: nothing does any more."""
    if around is not None:
        setattr(module, _AROUND, around)
    elif hasattr(module, _AROUND):
        delattr(module, _AROUND)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    options: AttentionOptions,
) -> torch.Tensor:
    """The attention of ``module``, by what is bound to it: [1, tokens, heads, value size]."""
    state: LayerState = getattr(module, _STATE)
    around: Around | None = getattr(module, _AROUND, None)
    if around is None:
        return state(query, key, value, attention_mask, options)
    return around(state, query, key, value, attention_mask, options)


def register() -> None:
    """Make both names known to transformers; calling it again changes nothing."""
    AttentionInterface.register(PROBE, _attention)
    AttentionInterface.register(PAGED, _attention)
    AttentionMaskInterface.register(PROBE, _examined_mask)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    unknown = keywords.keys() - INERT
    if unknown:
        raise ModelRefused(f"{_layer_name(module)} passes unknown keywords to its attention: {sorted(unknown)}")
    if scaling is None:
        raise ModelRefused(f"{_layer_name(module)} passes no scaling for its attention scores")
    if is_causal is False:
        raise ModelRefused(f"{_layer_name(module)} asks for attention that is not causal")
    options = AttentionOptions(scaling, sliding_window, softcap, s_aux)
    return attend(module, query, key, value, attention_mask, options), None


def _examined_mask(*, mask_function: Any, config: Any, device: torch.device, **_: Any) -> torch.Tensor:
    """Refuse every mask but causal ones, with or without a window; return the window as ``window_of`` reads it.

    transformers describes a mask by a function of index tensors (batch, head, query, key) that yields booleans.
    """
    sliding, chunk = (getattr(config, name, None) or 0 for name in ("sliding_window", "attention_chunk_size"))
    length = 2 * max(sliding, chunk) + 2
    keys = torch.arange(length, device=device)[None]
    queries = torch.tensor([0, 1, length // 2, length - 2, length - 1], device=device)[:, None]
    zero = torch.zeros((), dtype=torch.long, device=device)
    try:
        with _TextGoesOn():
            seen = mask_function(zero, zero, queries, keys).expand(len(queries), length)
    except IndexError as error:  # masks of packed sequences look their positions up in a table
        raise ModelRefused("the model's attention mask depends on more than the order of the tokens") from error
    causal = keys <= queries
    if torch.equal(seen, causal):
        found = 0.0
    elif sliding and torch.equal(seen, causal & (keys > queries - sliding)):
        found = sliding
    elif chunk and torch.equal(seen, causal & (keys // chunk == queries // chunk)):
        found = -chunk
    elif not seen.any():
        # Made of a window of 0 by models that make all masks and then use none of these (Qwen2-MoE).
        found = math.nan
    else:
        raise ModelRefused(
            "the model's attention mask is neither causal nor causal with the configured sliding window or chunks"
        )
    return torch.full((1, 1, 1, 1), float(found), device=device)


def window_of(mask: torch.Tensor | None) -> Window | None:
    """The window of a layer whose mask was examined; None: it sees everything.

    Raises ``ValueError`` for a mask that was not.
    """
    if mask is None or mask.shape != (1, 1, 1, 1) or mask.isnan():
        raise ValueError("the mask was not made by transformers' functions for masks, or hides everything")
    size = int(mask.item())
    return Window(abs(size), chunked=size < 0) if size else None


class _TextGoesOn(TorchFunctionMode):  # type: ignore[misc]
    """Within the block a table that tells no tokens apart is as long as it is asked for.

    Models with images look up in which image each token of a step lies, also where all of them are text.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.Tensor.__getitem__ and isinstance(args[1], tuple):
            table, places = args
            if table.numel() and bool((table == table.flatten()[0]).all()):
                limits = zip(places, table.shape, strict=False)
                args = table, tuple(place.clamp(max=size - 1) for place, size in limits)
        return function(*args, **keywords or {})


def _layer_name(module: nn.Module) -> str:
    return f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__})"

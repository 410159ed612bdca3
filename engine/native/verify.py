"""The torch reference of the C forward: shows that a model computes this formula, before its weights are packed.

Tokens are spread over the whole context, because some models behave differently far from its beginning: their queries
grow, for example. Each token attends only to itself, so that no others need to be computed. Attention between tokens is
compared at the first positions, once the weights are packed (``build.py``).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import silu

from engine.attention.base import AttentionOptions
from engine.closeness import difference
from engine.model import attention_hook
from engine.model.probe import ProbedLayer
from engine.native.errors import NotNative

TOLERANCE = 1e-4
"""As a share of the largest number: a hundred times the effect of the order of float32 sums, and far less than that of
any wrong formula."""
TOKENS = 16
PRIME = 7919


class Turns(NamedTuple):
    """The model's own cosines and sines of all positions, [positions, rotary dimensions] each."""

    cosines: torch.Tensor
    sines: torch.Tensor

    def turn(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate heads [heads, tokens, size] to their positions; dimensions beyond the rotary ones are unchanged."""
        turned, rest = heads.split([self.cosines.shape[1], heads.shape[2] - self.cosines.shape[1]], dim=2)
        first, second = turned.chunk(2, dim=2)
        across = torch.cat([-second, first], dim=2)
        return torch.cat([turned * self.cosines[positions] + across * self.sines[positions], rest], dim=2)


class _Call(NamedTuple):
    """What a layer hands to attention; tensors [1, heads, tokens, size]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: AttentionOptions


def read_turns(module: Any, max_context: int, size: int) -> Turns:
    """The angles of all positions. Raises ``NotNative`` unless each position and pair of dimensions has one."""
    rotary, hidden = module.model.rotary_emb, module.config.get_text_config().hidden_size
    try:
        with torch.inference_mode():
            cosines, sines = rotary(torch.zeros(1, 1, hidden), torch.arange(max_context)[None])
    except (TypeError, ValueError) as error:
        raise NotNative(f"{type(rotary).__name__} does not turn positions into cosines and sines: {error}") from error
    shape = list(cosines.shape)
    if shape[:-1] != [1, max_context] or list(sines.shape) != shape or shape[-1] % 2 or shape[-1] > size:
        raise NotNative(f"{type(rotary).__name__} makes {shape} cosines for {max_context} positions of heads of {size}")
    return Turns(cosines[0], sines[0])


def require_formula(module: Any, probed: list[ProbedLayer], turns: Turns) -> None:
    """Raises ``NotNative`` for the first thing that the model computes differently; nothing is changed.

    The structure of the model has been checked already (``decoder.py``).
    """
    last = len(turns.cosines) - 1
    positions = torch.linspace(0, last, min(TOKENS, last + 1), dtype=torch.float64).long()
    ids = torch.arange(1, len(positions) + 1) * PRIME % module.get_input_embeddings().num_embeddings
    with torch.inference_mode():
        calls, logits = _own(module, probed, ids, positions)
        states = module.get_input_embeddings()(ids)
        scaling = probed[0].module.scaling
        for layer, seen in zip(module.model.layers, probed, strict=True):
            call = calls[seen.module]
            options = call.options
            if options.softcap is not None or options.sinks is not None or options.scaling != scaling:
                raise NotNative(f"{seen.name} has a scaling, soft cap or sinks that the C code does not compute")
            normed = _normed(layer.input_layernorm, states)
            for part, found in (("q", call.query), ("k", call.key), ("v", call.value)):
                expected = _heads(seen.module, part, normed, found.shape[3])
                expected = expected if part == "v" else turns.turn(expected, positions)
                _require_equal(found[0], expected, f"the {part}_proj of {seen.name}")
            states = states + seen.module.o_proj(_alone(call.query, call.value).flatten(2))[0]
            normed, mlp = _normed(layer.post_attention_layernorm, states), layer.mlp
            states = states + mlp.down_proj(silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
        _require_equal(logits, module.get_output_embeddings()(_normed(module.model.norm, states)), "its logits")


def _own(
    module: Any, probed: list[ProbedLayer], ids: torch.Tensor, positions: torch.Tensor
) -> tuple[dict[nn.Module, _Call], torch.Tensor]:
    """The model's own attention calls, and its logits [tokens, vocabulary], if each token attends only to itself."""
    calls: dict[nn.Module, _Call] = {}

    def attend(layer: nn.Module, query: Any, key: Any, value: Any, _mask: object, options: Any) -> torch.Tensor:
        calls[layer] = _Call(query, key, value, options)
        return _alone(query, value)

    for seen in probed:
        attention_hook.bind(seen.module, partial(attend, seen.module))
    try:
        logits: torch.Tensor = module(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
    finally:
        for seen in probed:
            attention_hook.unbind(seen.module)
    return calls, logits


def _alone(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The output of each query head, [1, tokens, heads, size], if each token attends only to itself."""
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)


def _heads(attention: Any, part: str, normed: torch.Tensor, size: int) -> torch.Tensor:
    """Queries, keys or values [heads, tokens, size] before rotation."""
    heads = getattr(attention, f"{part}_proj")(normed).unflatten(1, (-1, size)).transpose(0, 1)
    norm = getattr(attention, f"{part}_norm", None)
    return heads if norm is None else _normed(norm, heads)


def _normed(norm: Any, values: torch.Tensor) -> torch.Tensor:
    scales: torch.Tensor = torch.rsqrt(values.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return values * scales * norm.weight


def _require_equal(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    apart = difference(found, expected)
    if apart > TOLERANCE:
        raise NotNative(f"{name}: differs from the formula of the C code by {apart:.1e} of the largest number")

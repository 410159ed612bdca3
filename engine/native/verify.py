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

from engine.attention.base import AttentionOptions
from engine.closeness import difference
from engine.model import attention_hook
from engine.model.probe import ProbedLayer
from engine.native.errors import NotNative
from engine.native.mixtures import Mixture
from engine.native.structure import LayerStructure, Structure, epsilon, text_body
from engine.packed.modules import rows_of

TOLERANCE = 1e-4
"""As a share of the largest number: a hundred times the effect of the order of float32 sums, and far less than that of
any wrong formula."""
TIES = 0.25
"""The share of tokens, or of texts, that may differ where there are experts: rounding sends a token to another expert
where two have nearly the same score, in any computation. A wrong formula shows in all of them."""
TOKENS = 16
PRIME = 7919


class Turns(NamedTuple):
    """The model's own cosines and sines of all positions, [positions, pairs of dimensions] each.

    The dimensions of a pair are neighbours where they are ``alternating``, else half of the rotary dimensions apart.
    """

    cosines: torch.Tensor
    sines: torch.Tensor
    alternating: bool = False

    def turn(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate heads [heads, tokens, size] to their positions; dimensions beyond the rotary ones are unchanged."""
        cosines, sines = self.cosines[positions], self.sines[positions]
        pairs = cosines.shape[1]
        turned, rest = heads[..., : 2 * pairs], heads[..., 2 * pairs :]
        places = (pairs, 2) if self.alternating else (2, pairs)
        first, second = turned.unflatten(2, places).unbind(3 if self.alternating else 2)
        parts = first * cosines - second * sines, second * cosines + first * sines
        return torch.cat([torch.stack(parts, dim=3 if self.alternating else 2).flatten(2), rest], dim=2)


class Rotations(NamedTuple):
    """The table by which each layer rotates, of so many ``positions``; None: it does not rotate."""

    positions: int
    of_layers: list[Turns | None]


class _Call(NamedTuple):
    """What a layer hands to attention; tensors [1, heads, tokens, size]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: AttentionOptions


def read_turns(module: Any, max_context: int, size: int) -> list[Turns]:
    """The angles of all positions by which layers may rotate, of each type of layer, for pairs of both kinds.

    Raises ``NotNative`` unless each position and pair of dimensions has one.
    """
    rotary, hidden = text_body(module).rotary_emb, module.config.get_text_config().hidden_size
    kinds = getattr(rotary, "layer_types", None)
    tables = []
    for kind in [()] if kinds is None else [(kind,) for kind in kinds]:
        cosines, sines = _read_table(rotary, hidden, max_context, size, *kind)
        tables += [Turns(cosines, sines), Turns(cosines, sines, alternating=True)]
    return tables


def _read_table(rotary: Any, hidden: int, max_context: int, size: int, *kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        with torch.inference_mode():
            cosines, sines = rotary(torch.zeros(1, 1, hidden), torch.arange(max_context)[None], *kind)
    except (TypeError, ValueError) as error:
        raise NotNative(f"{type(rotary).__name__} does not turn positions into cosines and sines: {error}") from error
    shape = list(cosines.shape)
    if shape[:-1] != [1, max_context] or list(sines.shape) != shape or shape[-1] > size:
        raise NotNative(f"{type(rotary).__name__} makes {shape} cosines for {max_context} positions of heads of {size}")
    table = _of_pairs(cosines[0]), _of_pairs(sines[0])
    if table[0].shape != table[1].shape or 2 * table[0].shape[1] > size:
        raise NotNative(f"{type(rotary).__name__} has other angles for the two dimensions of a pair")
    return table


def _of_pairs(table: torch.Tensor) -> torch.Tensor:
    """One number for each pair of dimensions, where some models repeat it for both."""
    half = table.shape[1] // 2
    for first, second in ((table[:, :half], table[:, half:]), (table[:, ::2], table[:, 1::2])):
        if torch.equal(first, second):
            return first.contiguous()
    return table


def require_formula(module: Any, structure: Structure, probed: list[ProbedLayer], tables: list[Turns]) -> Rotations:
    """The one of the ``tables`` by which each layer rotates.

    Raises ``NotNative`` for the first thing that the model computes differently; nothing is changed.
    """
    last = len(tables[0].cosines) - 1
    positions = torch.linspace(0, last, min(TOKENS, last + 1), dtype=torch.float64).long()
    ids = torch.arange(1, len(positions) + 1) * PRIME % structure.embedding.num_embeddings
    rotations: list[Turns | None] = []
    equal = partial(_require_equal, ties=ties(structure, len(ids)))
    with torch.inference_mode():
        calls, logits = _own(module, probed, ids, positions)
        states = rows_of(structure.embedding, ids) * structure.lookup_scale
        _require_equal(structure.embedding(ids), states, "its embedding")
        states = states * structure.vector_scale
        for layer, seen in zip(structure.layers, probed, strict=True):
            call = calls[seen.module]
            if (call.options.scaling, call.options.softcap) != (seen.options.scaling, seen.options.softcap):
                raise NotNative(f"{seen.name} scales or caps its scores by numbers that change")
            query, key, value = _heads(structure, layer, _normed(layer.before_attention, states))
            turns = _rotation(call, query, positions, tables)
            for part, found, heads in (("q", call.query, query), ("k", call.key, key)):
                expected = heads if turns is None else turns.turn(heads, positions)
                equal(found[0], expected, f"the {part}_proj of {seen.name}")
            equal(call.value[0], value, f"the v_proj of {seen.name}")
            rotations.append(turns)
            mixed = layer.attention.output(_alone(call.query, call.value).flatten(2))[0]
            states = states + _normed(layer.after_attention, mixed) * structure.branch_scale
            values, mlp = _normed(layer.before_mlp, states), layer.mlp
            mixed = mlp(values) if isinstance(mlp, Mixture) else mlp.computed(structure.gate, values)
            states = states + _normed(layer.after_mlp, mixed) * structure.branch_scale
        expected = structure.head(_normed(structure.norm, states)) * structure.logit_scale
        if structure.logit_cap is not None:
            expected = structure.logit_cap * torch.tanh(expected / structure.logit_cap)
        equal(logits, expected, "its logits")
    return Rotations(last + 1, rotations)


def gain(norm: Any) -> torch.Tensor:
    """What an RMS norm multiplies by: its weights, or as in Gemma's, one more. Shown by what it makes of some numbers.

    Raises ``NotNative`` for a norm that computes something else.
    """
    weight = norm.weight.detach().float()
    values = torch.linspace(-2, 3, len(weight), dtype=weight.dtype)
    with torch.inference_mode():
        found = norm(values[None])[0]
    apart = []
    for own in (weight, 1.0 + weight):
        apart.append(difference(found, _scaled(values, epsilon(norm)) * own))
        if apart[-1] <= TOLERANCE:
            return own
    raise NotNative(f"{type(norm).__name__} differs from an RMS norm by {min(apart):.1e} of the largest number")


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


def _heads(structure: Structure, layer: LayerStructure, normed: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values [heads, tokens, size] before rotation."""
    rows = layer.attention.mapped(normed).split(structure.widths, dim=1)
    heads = []
    for numbers, norm in zip(rows, (layer.query_norm, layer.key_norm, None), strict=True):
        whole = _normed(norm, numbers) if layer.whole_norms else numbers
        split = whole.unflatten(1, (-1, structure.size))
        heads.append((split if layer.whole_norms else _normed(norm, split)).transpose(0, 1))
    return heads


def _rotation(call: _Call, query: torch.Tensor, positions: torch.Tensor, tables: list[Turns]) -> Turns | None:
    """The table that comes nearest to the queries of a layer."""
    apart = {difference(call.query[0], query): None}
    apart |= {difference(call.query[0], turns.turn(query, positions)): turns for turns in reversed(tables)}
    return apart[min(apart)]


def _normed(norm: Any, values: torch.Tensor) -> torch.Tensor:
    return values if norm is None else _scaled(values, epsilon(norm)) * gain(norm)


def _scaled(values: torch.Tensor, eps: float) -> torch.Tensor:
    return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)


def ties(structure: Structure, count: int) -> int:
    """How many of so many tokens or texts may differ."""
    return int(TIES * count) if any(isinstance(layer.mlp, Mixture) for layer in structure.layers) else 0


def _require_equal(found: torch.Tensor, expected: torch.Tensor, name: str, ties: int = 0) -> None:
    """All tokens, [heads, tokens, numbers] or [tokens, numbers], but for so many, must be equal."""
    if ties and found.shape == expected.shape:
        by_token = (found - expected).abs().transpose(0, -2).flatten(1).amax(1)
        kept = by_token.argsort()[: len(by_token) - ties]  # a number that is none comes last
        found, expected = found.transpose(0, -2)[kept], expected.transpose(0, -2)[kept]
    apart = difference(found, expected)
    if apart > TOLERANCE:
        raise NotNative(f"{name}: differs from the formula of the C code by {apart:.1e} of the largest number")

"""Fuses each residual addition of a decoder layer with the RMSNorm that follows it: in the layer, and in the next one.

A layer's ``forward`` is replaced by one for the usual arrangement of its parts; what each part computes stays its own.
The norm after a layer's last addition is called by other code, as ever, and finds its result there.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

import torch
from torch import nn

from engine.closeness import ROUNDING, difference
from engine.fused.kernels import add_norm_kernel
from engine.fused.ops import FusedNorm, power_of_two, warps_of
from engine.model.architecture import ATTENTION, LAYER_NORMS, MLP, RESIDUAL_SCALE
from engine.model.loader import LoadedModel
from engine.model.probe import attending_to_itself, dry_run

_SCALES = (1.0, 1 / 256)  # of the hidden states: in small ones, what a layer adds is all that counts


class LayerNorms(NamedTuple):
    """The norms of a layer by their places, and the one that follows the layer, where any does."""

    before_attention: FusedNorm
    after_attention: FusedNorm | None
    before_mlp: FusedNorm
    after_mlp: FusedNorm | None
    following: FusedNorm | None = None


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """A decoder layer, its norms, and what it is called with beside hidden states [1, tokens, size]."""

    layer: Any
    norms: LayerNorms
    inputs: dict[str, Any]


class FuseLayers:
    """The ``Rewrite`` of decoder layers whose norms are fused already."""

    name = "decoder layers"
    tolerance = ROUNDING

    def find(self, model: LoadedModel) -> list[LayerPlace]:
        """The layers that pass to their attention all that they are called with, as a dry run shows."""
        norms = {module: found for module in model.module.modules() if (found := _norms_of(module))}
        if not norms:
            return []
        seen = _Observed(model.module, norms)
        return [
            LayerPlace(layer, norms[layer]._replace(following=seen.following.get(layer)), inputs)
            for layer, inputs in seen.inputs.items()
            if seen.attended.get(layer) == {name: id(value) for name, value in inputs.items()}
        ]

    def stand_ins(self, place: LayerPlace) -> list[FusedLayer]:
        return [FusedLayer(place)]

    def compare(self, place: LayerPlace, stand_in: FusedLayer) -> tuple[float, torch.dtype]:
        """The largest difference of the layer's result and of its norm, for usual and for small hidden states."""
        following, weight = place.norms.following, place.norms.before_mlp.weight
        numbers = torch.randn(1, 4, len(weight), generator=torch.Generator().manual_seed(0))
        apart = 0.0
        with torch.inference_mode(), attending_to_itself(place.layer):
            for scale in _SCALES:
                hidden = (numbers * scale).to(weight.device, weight.dtype)
                expected, found = place.layer(hidden, **place.inputs), stand_in(hidden, **place.inputs)
                if not isinstance(expected, torch.Tensor):
                    return inf, weight.dtype
                apart = max(apart, difference(found, expected))
                if following is not None:
                    apart = max(apart, difference(following(found), following(expected)))
        return apart, weight.dtype

    def swap(self, place: LayerPlace, stand_in: FusedLayer) -> None:
        place.layer.forward = stand_in


class FusedLayer:
    """What a decoder layer computes, with its additions and norms in one kernel each."""

    def __init__(self, place: LayerPlace) -> None:
        self._layer = place.layer
        self._norms = place.norms
        self._scale = float(getattr(place.layer, RESIDUAL_SCALE, 1.0))

    def __call__(self, hidden_states: torch.Tensor, **inputs: Any) -> torch.Tensor:
        norms = self._norms
        normed = norms.before_attention(hidden_states)
        delta = _tensor_of(getattr(self._layer, ATTENTION)(hidden_states=normed, **inputs))
        hidden_states, normed = add_norm(hidden_states, delta, norms.before_mlp, norms.after_attention, self._scale)
        delta = _tensor_of(getattr(self._layer, MLP)(normed))
        if norms.following is None:
            delta = delta if norms.after_mlp is None else norms.after_mlp(delta)
            return hidden_states + (delta if self._scale == 1.0 else delta * self._scale)
        total, normed = add_norm(hidden_states, delta, norms.following, norms.after_mlp, self._scale)
        norms.following.expect(total, normed)
        return total


def add_norm(
    residual: torch.Tensor,
    delta: torch.Tensor,
    norm: FusedNorm,
    delta_norm: FusedNorm | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of ``residual`` and ``scale * delta_norm(delta)``, both [..., size], and the ``norm`` of the sum."""
    residual, delta = residual.contiguous(), delta.contiguous()
    size = residual.shape[-1]
    total, normed = torch.empty_like(residual), torch.empty_like(residual)
    first = delta_norm or norm
    add_norm_kernel[(residual.numel() // size,)](
        total,
        normed,
        residual,
        delta,
        norm.weight,
        norm.eps,
        first.weight,
        first.eps,
        SIZE=size,
        WIDTH=power_of_two(size),
        SCALE=scale,
        OFFSET=norm.offset,
        ROUND_FIRST=norm.round_first,
        DELTA_NORM=delta_norm is not None,
        DELTA_OFFSET=first.offset,
        DELTA_ROUND_FIRST=first.round_first,
        num_warps=warps_of(size),
    )
    return total, normed


class _Observed:
    """What a dry run shows of some layers."""

    def __init__(self, model: Any, layers: dict[nn.Module, Any]) -> None:
        self.inputs: dict[nn.Module, dict[str, Any]] = {}
        """What each was called with, by name, beside its hidden states."""
        self.attended: dict[nn.Module, dict[str, int]] = {}
        """The identities of what each called its attention with, by name."""
        self.following: dict[nn.Module, FusedNorm] = {}
        """The norm that took its result, unchanged."""
        self._results: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
        handles = []
        for layer in layers:
            attention = getattr(layer, ATTENTION)
            handles.append(layer.register_forward_pre_hook(self._note_layer, with_kwargs=True))
            handles.append(layer.register_forward_hook(self._note_result))

            def note(_: nn.Module, _args: Any, named: Any, layer: nn.Module = layer) -> None:
                self.attended[layer] = {name: id(value) for name, value in named.items() if name != "hidden_states"}

            handles.append(attention.register_forward_pre_hook(note, with_kwargs=True))
        norms = [module for module in model.modules() if isinstance(module, FusedNorm)]
        handles += [norm.register_forward_pre_hook(self._note_norm) for norm in norms]
        dry_run(model, handles)
        self._results.clear()

    def _note_layer(self, layer: nn.Module, args: Any, named: Any) -> None:
        if len(args) == 1:
            self.inputs[layer] = dict(named)

    def _note_result(self, layer: nn.Module, _args: Any, result: Any) -> None:
        if isinstance(result, torch.Tensor):
            self._results.append((layer, result, result.clone()))

    def _note_norm(self, norm: FusedNorm, args: Any) -> None:
        for layer, result, copy in self._results:
            if args[0] is result and torch.equal(result, copy):
                self.following.setdefault(layer, norm)


def _norms_of(layer: nn.Module) -> LayerNorms | None:
    """The norms of a decoder layer in one of the arrangements; all its other parts have to be without parameters."""
    children = dict(layer.named_children())
    if not {ATTENTION, MLP} <= children.keys() or "forward" in vars(layer):
        return None
    others = {name for name, child in children.items() if any(True for _ in child.parameters())} - {ATTENTION, MLP}
    for names in LAYER_NORMS:
        norms = [children.get(name) if name else None for name in names]
        fused = all(name is None or isinstance(norm, FusedNorm) for name, norm in zip(names, norms, strict=True))
        if fused and others == {name for name in names if name}:
            return LayerNorms(*norms)  # type: ignore[arg-type]
    return None


def _tensor_of(result: Any) -> torch.Tensor:
    """The result of a part of a layer: some return more beside it."""
    found: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return found

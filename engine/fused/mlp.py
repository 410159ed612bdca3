"""Fuses the activation of a gated MLP with the product that follows it: ``activation(gate) * up`` is one kernel.

The kernel reads gate and up where the linear layers left them, also as the two halves of one joined product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import nn

from engine.closeness import ROUNDING, difference
from engine.fused.kernels import ACTIVATIONS, activate_kernel
from engine.model.architecture import DOWN, GATE_AND_UP
from engine.model.loader import LoadedModel

_SCALES = (0.1, 1.0, 30.0)  # activations are alike near zero, and far from it
_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class MlpPlace:
    """A gated MLP, and the names of the linear layers in it that compute gate and up."""

    mlp: nn.Module
    names: tuple[str, ...]


class FuseGatedMlps:
    """The ``Rewrite`` of gated MLPs. The module stays, with all its parameters; its ``forward`` is replaced."""

    name = "gated MLPs"
    tolerance = ROUNDING

    def find(self, model: LoadedModel) -> list[MlpPlace]:
        places = []
        for module in model.module.modules():
            children = dict(module.named_children())
            for names in GATE_AND_UP:
                others = [child for name, child in children.items() if name not in (*names, DOWN)]
                computes = {*names, DOWN} <= children.keys() and "forward" not in vars(module)
                if computes and not any(True for child in others for _ in child.parameters()):
                    places.append(MlpPlace(module, names))
        return places

    def stand_ins(self, place: MlpPlace) -> list[FusedMlp]:
        """One for each activation that the kernel knows."""
        return [FusedMlp(place, activation) for activation in ACTIVATIONS]

    def compare(self, place: MlpPlace, stand_in: FusedMlp) -> tuple[float, torch.dtype]:
        """The largest difference of small, usual and large inputs, each as a share of its own largest number."""
        weight = getattr(place.mlp, place.names[0]).weight
        numbers = torch.randn(1, 3, weight.shape[1], generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            sources = [(numbers * scale).to(weight.device, weight.dtype) for scale in _SCALES]
            return max(difference(stand_in(source), place.mlp(source)) for source in sources), weight.dtype

    def swap(self, place: MlpPlace, stand_in: FusedMlp) -> None:
        place.mlp.forward = stand_in


class FusedMlp:
    """What a gated MLP computes: ``down(activation(gate) * up)``."""

    def __init__(self, place: MlpPlace, activation: str) -> None:
        self._mlp: Any = place.mlp
        self._names = place.names
        self._activation = activation

    def __call__(self, source: torch.Tensor) -> torch.Tensor:
        products = [getattr(self._mlp, name)(source) for name in self._names]
        gate, up = products if len(products) == 2 else products[0].chunk(2, dim=-1)
        found: torch.Tensor = getattr(self._mlp, DOWN)(activated(gate, up, self._activation))
        return found


def activated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """``activation(gate) * up`` of rows [..., size] that may be parts of longer ones; ``activation`` of ACTIVATIONS."""
    size = gate.shape[-1]
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = gate.reshape(-1, size), up.reshape(-1, size)  # views, where all rows have one stride
    activate_kernel[(len(gate), triton.cdiv(size, _BLOCK))](
        out,
        gate,
        up,
        gate.stride(0),
        up.stride(0),
        SIZE=size,
        BLOCK=_BLOCK,
        ACTIVATION=activation,
        num_warps=4,
    )
    return out

"""Fuses linears that share an input (QKV, gate/up): one product over the joined weights.

A decode step waits for memory and launches: one product over the joined weights reads as much with a single launch. The
model's own code is unchanged: the first linear layer of a group computes for all, the others return their part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from engine.closeness import REORDERED_SUMS, difference
from engine.model.architecture import SHARED_INPUT
from engine.model.loader import LoadedModel
from engine.model.probe import dry_run


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linear layers of ``parent`` that share an input, by name in the order of their calls."""

    parent: nn.Module
    members: dict[str, nn.Linear]


class FuseLinears:
    """The ``Rewrite`` of linear layers that a dry run shows to share their input."""

    name = "groups of linears that share an input"
    tolerance = REORDERED_SUMS

    def find(self, model: LoadedModel) -> list[LinearGroup]:
        """The groups whose members were each called once, and all with one and the same tensor."""
        found = [LinearGroup(parent, members) for parent in model.module.modules() for members in _groups_of(parent)]
        calls: dict[nn.Module, list[tuple[str, torch.Tensor]]] = {group.parent: [] for group in found}
        handles = []
        for group in found:
            for name, layer in group.members.items():

                def note(_: nn.Module, inputs: Any, parent: nn.Module = group.parent, name: str = name) -> None:
                    calls[parent].append((name, inputs[0]))

                handles.append(layer.register_forward_pre_hook(note))
        if found:
            dry_run(model.module, handles)
        sharing = []
        for group in found:
            mine = [(name, source) for name, source in calls[group.parent] if name in group.members]
            once = sorted(name for name, _ in mine) == sorted(group.members)
            if once and all(source is mine[0][1] for _, source in mine):
                sharing.append(LinearGroup(group.parent, {name: group.members[name] for name, _ in mine}))
        return sharing

    def stand_ins(self, place: LinearGroup) -> list[list[nn.Module]]:
        """A single choice: one stand-in for each member."""
        joined = Joined(list(place.members.values()))
        return [[FirstLinear(joined), *(_Other(joined, number) for number in range(1, len(place.members)))]]

    def compare(self, place: LinearGroup, stand_in: list[nn.Module]) -> tuple[float, torch.dtype]:
        """The largest difference of a member, in the order of the calls."""
        layers = list(place.members.values())
        weight = layers[0].weight
        source = torch.randn(3, layers[0].in_features, generator=torch.Generator().manual_seed(0))
        source = source.to(weight.device, weight.dtype)
        with torch.inference_mode():
            apart = [difference(new(source), layer(source)) for layer, new in zip(layers, stand_in, strict=True)]
        return max(apart), weight.dtype

    def swap(self, place: LinearGroup, stand_in: list[nn.Module]) -> None:
        for name, new in zip(place.members, stand_in, strict=True):
            setattr(place.parent, name, new)


class Joined:
    """The weights of a group, what computes its product, and the parts of the last one that are not taken yet."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self.sizes = [layer.out_features for layer in layers]
        self.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        self.multiply: Callable[[torch.Tensor], torch.Tensor] = self._multiply
        self.source: torch.Tensor | None = None
        self.parts: dict[int, torch.Tensor] = {}

    def _multiply(self, source: torch.Tensor) -> torch.Tensor:
        return functional.linear(source, self.weight, self.bias)

    def rows(self, number: int) -> slice:
        begin = sum(self.sizes[:number])
        return slice(begin, begin + self.sizes[number])


class FirstLinear(nn.Module):  # type: ignore[misc]
    """Stands in for the linear layer of a group that is called first: computes the products of all."""

    def __init__(self, joined: Joined) -> None:
        super().__init__()
        self.joined = joined
        self.joined_weight, self.joined_bias = joined.weight, joined.bias

    @property
    def weight(self) -> torch.Tensor:
        return self.joined.weight[self.joined.rows(0)]

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        joined = self.joined
        first, *others = joined.multiply(source).split(joined.sizes, dim=-1)
        joined.source, joined.parts = source, dict(enumerate(others, 1))
        return first


class _Other(nn.Module):  # type: ignore[misc]
    """Stands in for another linear layer of a group: returns its part, or computes it if called with another input."""

    def __init__(self, joined: Joined, number: int) -> None:
        super().__init__()
        self._joined = joined
        self._number = number

    @property
    def weight(self) -> torch.Tensor:
        return self._joined.weight[self._joined.rows(self._number)]

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        joined = self._joined
        if source is not joined.source or self._number not in joined.parts:
            bias = None if joined.bias is None else joined.bias[joined.rows(self._number)]
            return functional.linear(source, self.weight, bias)
        part = joined.parts.pop(self._number)
        if not joined.parts:
            joined.source = None  # nothing of a step is kept until the next
        return part


def _groups_of(parent: nn.Module) -> list[dict[str, nn.Linear]]:
    children = dict(parent.named_children())
    groups = []
    for names in SHARED_INPUT:
        members = {name: children[name] for name in names if is_plain(children.get(name))}
        kinds = {(x.in_features, x.weight.dtype, x.weight.device, x.bias is None) for x in members.values()}
        if len(members) > 1 and len(kinds) == 1:
            groups.append(members)
    return groups


def is_plain(layer: Any) -> bool:
    """A linear layer and nothing more: no subclass, no hooks, no forward of its own (as offloading gives it)."""
    hooked = type(layer) is nn.Linear and (layer._forward_hooks or layer._forward_pre_hooks)
    return type(layer) is nn.Linear and not hooked and "forward" not in vars(layer)

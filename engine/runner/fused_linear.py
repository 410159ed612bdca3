"""Products that share their input are computed as one: queries, keys and values; gate and up.

A decode step waits for memory and for launches: one product over the joined weights reads as much and starts once. The
model's own code stays as it is: the first of a group of linear layers computes for all, the others hand out their part.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from engine.model.probe import dry_run

_log = logging.getLogger(__name__)

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# How far apart the same product may be when computed in another order, in shares of the largest result: some steps of
# the type's precision.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

_Calls = list[tuple[str, torch.Tensor]]


def fuse(model: Any) -> int:
    """Join what can be joined in a loaded model, before its layers are bound; returns the number of groups.

    A group stays as it was where a dry run shows that its layers do not share their input, or where the joined product
    of a random input differs from the single ones by more than rounding.
    """
    found = [(parent, members) for parent in model.modules() for members in _groups_of(parent)]
    calls = _observe(model, [parent for parent, _ in found])
    total, joined = len(found), 0
    while found:
        # Taken out of the list: what held all groups to the end would hold all their weights twice.
        parent, members = found.pop()
        order = _shared_order(calls[parent], members)
        if order is not None:
            joined += _join(parent, {name: members[name] for name in order})
    _log.info("%d of %d groups of weights are computed as one", joined, total)
    return joined


class _Joined:
    """The weights of a group, and the parts of its last product that nobody has taken yet."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self.sizes = [layer.out_features for layer in layers]
        self.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        self.source: torch.Tensor | None = None
        self.parts: dict[int, torch.Tensor] = {}

    def rows(self, number: int) -> slice:
        begin = sum(self.sizes[:number])
        return slice(begin, begin + self.sizes[number])


class _First(nn.Module):  # type: ignore[misc]
    """Stands in for the linear layer of a group that is called first: computes the products of all."""

    def __init__(self, joined: _Joined) -> None:
        super().__init__()
        self._joined = joined
        self.joined_weight, self.joined_bias = joined.weight, joined.bias

    @property
    def weight(self) -> torch.Tensor:
        return self._joined.weight[self._joined.rows(0)]

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        joined = self._joined
        first, *others = functional.linear(source, joined.weight, joined.bias).split(joined.sizes, dim=-1)
        joined.source, joined.parts = source, dict(enumerate(others, 1))
        return first


class _Other(nn.Module):  # type: ignore[misc]
    """Stands in for another linear layer of a group: hands out its part, or computes it for an input of its own."""

    def __init__(self, joined: _Joined, number: int) -> None:
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
    for names in GROUPS:
        members = {name: children[name] for name in names if _is_plain(children.get(name))}
        if len(members) > 1 and len({_kind(layer) for layer in members.values()}) == 1:
            groups.append(members)
    return groups


def _is_plain(layer: Any) -> bool:
    """A linear layer and nothing more: no subclass, no hooks, no forward of its own (as offloading gives it)."""
    hooked = type(layer) is nn.Linear and (layer._forward_hooks or layer._forward_pre_hooks)
    return type(layer) is nn.Linear and not hooked and "forward" not in vars(layer)


def _kind(layer: nn.Linear) -> tuple[Any, ...]:
    return layer.in_features, layer.weight.dtype, layer.weight.device, layer.bias is None


def _observe(model: Any, parents: list[nn.Module]) -> dict[nn.Module, _Calls]:
    """Which members were called with what, in order, by a dry run."""
    calls: dict[nn.Module, _Calls] = {parent: [] for parent in parents}
    handles = []
    for parent in calls:
        for name in (name for members in _groups_of(parent) for name in members):

            def note(_layer: nn.Module, inputs: tuple[Any, ...], parent: nn.Module = parent, name: str = name) -> None:
                calls[parent].append((name, inputs[0]))

            handles.append(getattr(parent, name).register_forward_pre_hook(note))
    try:
        if calls:
            dry_run(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _shared_order(calls: _Calls, members: dict[str, nn.Linear]) -> list[str] | None:
    """The members in the order of their calls, if each was called once and all with one and the same input."""
    mine = [(name, source) for name, source in calls if name in members]
    order = [name for name, _ in mine]
    if sorted(order) != sorted(members) or any(source is not mine[0][1] for _, source in mine):
        return None
    return order


def _join(parent: nn.Module, members: dict[str, nn.Linear]) -> bool:
    """Replace the members, first called first, if the results agree."""
    layers = list(members.values())
    joined = _Joined(layers)
    stand_ins: list[nn.Module] = [_First(joined), *(_Other(joined, number) for number in range(1, len(layers)))]
    if not _agree(layers, stand_ins):
        _log.warning("The weights of %s are computed one by one: together they differ", type(parent).__name__)
        return False
    for name, stand_in in zip(members, stand_ins, strict=True):
        setattr(parent, name, stand_in)
    return True


def _agree(layers: list[nn.Linear], stand_ins: list[nn.Module]) -> bool:
    """Whether both give the same for a random input, in the order of the calls."""
    weight = layers[0].weight
    source = torch.randn(3, layers[0].in_features, generator=torch.Generator().manual_seed(0))
    source = source.to(weight.device, weight.dtype)
    with torch.inference_mode():
        for layer, stand_in in zip(layers, stand_ins, strict=True):
            expected, found = layer(source).float(), stand_in(source).float()
            # Written so that NaN disagrees.
            if not (found - expected).abs().max() <= _TOLERANCE.get(weight.dtype, 0.0) * expected.abs().max():
                return False
    return True

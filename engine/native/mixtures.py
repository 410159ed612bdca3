"""Gated MLPs and mixtures of them, as the native forward computes them, found in transformers' modules by their names.

As in ``structure.py``, names only say where to look; nothing but structure is read before ``Mixture.maps``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from engine.model.architecture import DOWN
from engine.native.errors import NotNative
from engine.native.packing import GROUP

ACTIVATIONS = {"silu": 1, "gelu_pytorch_tanh": 2, "clamped silu": 3}
"""As ``activations.h`` numbers them; the last is gpt-oss's."""
CLAMPED = "clamped silu"
ROUTERS = ("gate", "router")
EXPERTS, GATE_UP = "experts", "gate_up_proj"
EXPERT_PARAMETERS = frozenset({GATE_UP, DOWN}), frozenset({GATE_UP, DOWN, f"{GATE_UP}_bias", f"{DOWN}_bias"})
ROUTER_PARAMETERS = frozenset({"weight"}), frozenset({"weight", "bias"})


class Gate(NamedTuple):
    """What a gated MLP makes of gate and up; steepness and limit are those of ``CLAMPED``."""

    activation: str
    steepness: float = 0.0
    limit: float = 0.0

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if self.activation == CLAMPED:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            return gate * torch.sigmoid(gate * self.steepness) * (up + 1)
        if self.activation == "silu":
            return nn.functional.silu(gate) * up
        return nn.functional.gelu(gate, approximate="tanh") * up


class Map(NamedTuple):
    """A linear map on its own: [channels, columns] and [channels]."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(values, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Experts [experts, ...] in one module, ``chosen`` of which compute each token as the router says.

    Their results are weighted by a softmax of the router's scores: of the chosen ones, or of all.
    """

    router: Any
    experts: Any
    count: int
    inner: int
    chosen: int
    shares_of_chosen: bool
    gate: Gate

    def maps(self, expert: int) -> tuple[Map, Map]:
        """Gate and up of an expert, one after another, and what follows them."""
        return self._map(GATE_UP, expert), self._map(DOWN, expert)

    def _map(self, name: str, expert: int) -> Map:
        weight, bias = getattr(self.experts, name)[expert], getattr(self.experts, f"{name}_bias", None)
        weight, bias = (weight.T if self.experts.is_transposed else weight), None if bias is None else bias[expert]
        if name == DOWN or self.experts.is_concatenated:
            return Map(weight, bias)
        # Channels of gate and up alternate.
        weight = torch.cat([weight[::2], weight[1::2]])
        return Map(weight, None if bias is None else torch.cat([bias[::2], bias[1::2]]))

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """The torch reference, for [tokens, hidden]."""
        scores = Map(self.router.weight, getattr(self.router, "bias", None))(values)
        best, chosen = scores.topk(self.chosen, dim=1)
        shares = best.softmax(1) if self.shares_of_chosen else scores.softmax(1).gather(1, chosen)
        out = torch.zeros_like(values)
        for expert in chosen.unique().tolist():
            tokens, places = torch.where(chosen == expert)
            first, last = self.maps(expert)
            result = last(self.gate(*first(values[tokens]).chunk(2, dim=1)))
            out[tokens] += result * shares[tokens, places, None]
        return out


def read_mixture(module: Any, hidden: int, activation: str) -> Mixture | None:
    """A mixture of experts; None for an MLP of another kind. Raises ``NotNative`` for a mixture that is not known."""
    children = dict(module.named_children())
    if EXPERTS not in children:
        return None
    router = next((children[name] for name in ROUTERS if children.keys() == {EXPERTS, name}), None)
    if router is None:
        raise NotNative(f"{type(module).__name__} has the parts {sorted(children)}")
    experts = children[EXPERTS]
    for part, known in ((experts, EXPERT_PARAMETERS), (router, ROUTER_PARAMETERS)):
        names = {name for name, _ in part.named_parameters()}
        if names not in known:
            raise NotNative(f"{type(part).__name__} has the parameters {sorted(names)}")
    if not all(hasattr(experts, name) for name in ("is_transposed", "is_concatenated")):
        raise NotNative(f"{type(experts).__name__} does not say how its weights are laid out")
    gate = Gate(activation)
    if hasattr(experts, "limit"):
        gate = Gate(CLAMPED, float(experts.alpha), float(experts.limit))
    # Routers that do not say so weigh by shares of the chosen ones.
    shares_of_chosen = bool(getattr(router, "norm_topk_prob", True))
    shapes = {name: tuple(getattr(experts, name).shape) for name in (GATE_UP, DOWN)}
    count, inner = shapes[DOWN][0], shapes[DOWN][1 if experts.is_transposed else 2]
    sizes = {GATE_UP: (2 * inner, hidden), DOWN: (hidden, inner)}
    if shapes != {name: (count, *size[:: -1 if experts.is_transposed else 1]) for name, size in sizes.items()}:
        raise NotNative(f"its experts have the shapes {shapes}")
    if inner % GROUP or hidden % GROUP or router.weight.shape != (count, hidden):
        raise NotNative(f"experts of {hidden} and {inner} numbers do not divide into whole panels and groups")
    return Mixture(router, experts, count, inner, router.top_k, shares_of_chosen, gate)

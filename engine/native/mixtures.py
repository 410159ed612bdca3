"""Gated MLPs and mixtures of them, as the native forward computes them, found in transformers' modules by their names.

As in ``structure.py``, names only say where to look; nothing but structure is read before ``Mixture.maps``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from engine.model.architecture import DOWN, GATE_AND_UP
from engine.native.errors import NotNative
from engine.native.packing import GROUP
from engine.native.products import PanelProduct

ACTIVATIONS = {"silu": 1, "gelu_pytorch_tanh": 2, "clamped silu": 3}
"""As ``activations.h`` numbers them; the last is gpt-oss's."""
CLAMPED = "clamped silu"
FUNCTIONS = frozenset({"act_fn", "activation_fn", "activation"})
"""What MLPs call their activation."""
JOINED, OUTPUT = "input_linear", "output_linear"
"""What Granite's call gate and up in one, and what follows."""
ROUTERS = frozenset({"gate", "router"})
SHARED = frozenset({"shared_expert", "shared_experts"})
"""What mixtures call the MLP that all tokens see."""
SHARED_SCORE = "shared_expert_gate"
EXPERTS, GATE_UP = "experts", "gate_up_proj"
EXPERT_PARAMETERS = frozenset({GATE_UP, DOWN}), frozenset({GATE_UP, DOWN, f"{GATE_UP}_bias", f"{DOWN}_bias"})
ROUTER_PARAMETERS = frozenset({"weight"}), frozenset({"weight", "bias"})
CORRECTION = "e_score_correction_bias"
SOFTMAX_CORRECTION = f"moe_statics.{CORRECTION}"
"""Where the scores are a softmax all the same."""
ROUTED_SCALES = "routed_scaling_factor", "router_scaling_factor"


class Gate(NamedTuple):
    """What a gated MLP makes of gates and ups; steepness and limit are those of ``CLAMPED``.

    Gates and ups are in turn where they are ``alternating``, else all ups follow all gates.
    """

    activation: str
    steepness: float = 0.0
    limit: float = 0.0
    alternating: bool = False

    def __call__(self, numbers: torch.Tensor) -> torch.Tensor:
        """Of numbers [tokens, 2 * inner]: [tokens, inner]."""
        gate, up = (numbers[:, ::2], numbers[:, 1::2]) if self.alternating else numbers.chunk(2, dim=1)
        if self.activation == CLAMPED:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            return gate * torch.sigmoid(gate * self.steepness) * (up + 1)
        if self.activation == "silu":
            return nn.functional.silu(gate) * up
        return nn.functional.gelu(gate, approximate="tanh") * up


@dataclass(frozen=True, slots=True)
class Branch:
    """Attention or an MLP: linear maps of the same input, one after another, and the map of the result."""

    inputs: tuple[Any, ...]
    output: Any

    @property
    def inner(self) -> int:
        """How many numbers stand between the maps."""
        return int(getattr(self.output, "in_features", 0))

    widest = inner

    def mapped(self, values: torch.Tensor) -> torch.Tensor:
        """What the first maps make of [tokens, hidden], side by side."""
        return torch.cat([linear(values) for linear in self.inputs], dim=1)

    def computed(self, gate: Gate, values: torch.Tensor) -> torch.Tensor:
        """The torch reference of an MLP, for [tokens, hidden]."""
        out: torch.Tensor = self.output(gate(self.mapped(values)))
        return out


class Map(NamedTuple):
    """A linear map of one expert: its weight [channels, columns], or what multiplies by that, and bias [channels]."""

    weight: torch.Tensor | PanelProduct
    bias: torch.Tensor | None

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        if isinstance(self.weight, PanelProduct):
            found = self.weight(values.float().contiguous())
            return found if self.bias is None else found + self.bias
        return nn.functional.linear(values, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Routing:
    """How tokens find their experts: ``chosen`` of them, and by which weights the results of these are added.

    Scores, by ``weight`` and ``bias`` of ``router``, become a softmax or sigmoids. What they are chosen by has a
    ``correction`` [experts] added, and only experts are looked at in those of ``groups`` whose two best have the
    largest scores together. Weights are made to sum to one where they are ``shares_of_chosen``, and then scaled.
    """

    router: Any
    chosen: int
    sigmoid: bool
    correction: torch.Tensor | None
    groups: int
    groups_chosen: int
    shares_of_chosen: bool
    scale: float

    def __call__(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The torch reference: for values [tokens, hidden] weights and numbers of experts, [tokens, chosen] each."""
        scores = nn.functional.linear(values, self.router.weight, getattr(self.router, "bias", None))
        weights = scores.sigmoid() if self.sigmoid else scores.softmax(1)
        merits = scores if self.correction is None else weights + self.correction
        if self.groups_chosen < self.groups:
            grouped = merits.unflatten(1, (self.groups, -1))
            kept = grouped.topk(2, dim=2).values.sum(2).topk(self.groups_chosen, dim=1).indices
            others = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter(1, kept, False)
            merits = grouped.masked_fill(others[:, :, None], -torch.inf).flatten(1)
        chosen = merits.topk(self.chosen, dim=1).indices
        weights = weights.gather(1, chosen)
        if self.shares_of_chosen:
            weights = weights / weights.sum(1, keepdim=True)
        return weights * self.scale, chosen


@dataclass(frozen=True, slots=True)
class Mixture:
    """Experts [experts, ...] in one module, some of which compute each token, and an MLP ``shared`` by all tokens.

    What that gives is multiplied by the sigmoid of ``shared_score``, where there is one.
    """

    routing: Routing
    experts: Any
    count: int
    inner: int
    gate: Gate
    shared: Branch | None
    shared_gate: Gate
    shared_score: Any

    @property
    def widest(self) -> int:
        """The most numbers that stand between two maps."""
        return max(self.inner, 0 if self.shared is None else self.shared.inner)

    def maps(self, expert: int) -> tuple[Map, Map]:
        """Gate and up of an expert, and what follows them."""
        return self._map(GATE_UP, expert), self._map(DOWN, expert)

    def _map(self, name: str, expert: int) -> Map:
        biases = getattr(self.experts, f"{name}_bias", None)
        bias = None if biases is None else biases[expert]
        products = getattr(self.experts, "packed_products", {})
        if name in products:
            return Map(products[name][expert], bias)
        weight = getattr(self.experts, name)[expert]
        return Map(weight.T if self.experts.is_transposed else weight, bias)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """The torch reference, for [tokens, hidden]."""
        weights, chosen = self.routing(values)
        out = torch.zeros_like(values)
        if self.shared is not None:
            out = self.shared.computed(self.shared_gate, values)
        if self.shared_score is not None:
            out = out * self.shared_score(values).sigmoid()
        for expert in chosen.unique().tolist():
            tokens, places = torch.where(chosen == expert)
            first, last = self.maps(expert)
            out[tokens] += last(self.gate(first(values[tokens]))) * weights[tokens, places, None]
        return out


def parts_of(module: Any) -> set[str]:
    """The names of a module's parts; where nothing is trained, a dropout is none."""
    return {name for name, part in module.named_children() if not isinstance(part, nn.Dropout)}


def read_branch(module: Any, inputs: tuple[tuple[str, ...], ...], output: str, others: frozenset[str]) -> Branch:
    """Maps by their names in a module that has no parts but those and ``others``. Raises ``NotNative`` for another."""
    found = parts_of(module)
    for names in inputs:
        if {*names, output} <= found <= {*names, output} | others:
            return Branch(tuple(getattr(module, name) for name in names), getattr(module, output))
    raise NotNative(f"{type(module).__name__} has the parts {sorted(found)}")


def read_mlp(module: Any) -> Branch:
    """A gated MLP. Raises ``NotNative`` for one of another kind."""
    if hasattr(module, JOINED):
        return read_branch(module, ((JOINED,),), OUTPUT, FUNCTIONS)
    return read_branch(module, GATE_AND_UP, DOWN, FUNCTIONS)


def read_mixture(module: Any, beside: Any, hidden: int, activation: str) -> Mixture | None:
    """A mixture of experts; None for an MLP of another kind. Raises ``NotNative`` for a mixture that is not known.

    ``beside`` is an MLP that all tokens see too, where the layer has it, and not the mixture.
    """
    children = dict(module.named_children())
    if EXPERTS not in children:
        return None
    names = children.keys() - {EXPERTS, SHARED_SCORE} - SHARED
    if len(names) != 1 or not names <= ROUTERS or len(children.keys() & SHARED) > 1:
        raise NotNative(f"{type(module).__name__} has the parts {sorted(children)}")
    shared = next((children[name] for name in children.keys() & SHARED), beside)
    experts, routing = children[EXPERTS], _routing(module, children[names.pop()])
    stored = getattr(experts, "packed", {})
    parameters = {name for name, _ in experts.named_parameters()} | stored.keys()
    if parameters not in EXPERT_PARAMETERS:
        raise NotNative(f"{type(experts).__name__} has the parameters {sorted(parameters)}")
    if not all(hasattr(experts, name) for name in ("is_transposed", "is_concatenated")):
        raise NotNative(f"{type(experts).__name__} does not say how its weights are laid out")
    gate = Gate(activation, alternating=not experts.is_concatenated)
    if hasattr(experts, "limit"):
        gate = Gate(CLAMPED, float(experts.alpha), float(experts.limit), gate.alternating)
    shapes = {
        name: tuple(stored[name].shape() if name in stored else getattr(experts, name).shape)
        for name in (GATE_UP, DOWN)
    }
    count, inner = shapes[DOWN][0], shapes[DOWN][1 if experts.is_transposed else 2]
    sizes = {GATE_UP: (2 * inner, hidden), DOWN: (hidden, inner)}
    if shapes != {name: (count, *size[:: -1 if experts.is_transposed else 1]) for name, size in sizes.items()}:
        raise NotNative(f"its experts have the shapes {shapes}")
    if inner % GROUP or hidden % GROUP or routing.router.weight.shape != (count, hidden):
        raise NotNative(f"experts of {hidden} and {inner} numbers do not divide into whole panels and groups")
    if count % routing.groups or routing.chosen > count // routing.groups * routing.groups_chosen:
        raise NotNative(f"{routing.chosen} of {count} experts cannot be chosen in {routing.groups} groups")
    return Mixture(
        routing,
        experts,
        count,
        inner,
        gate,
        None if shared is None else read_mlp(shared),
        Gate(activation),
        children.get(SHARED_SCORE),
    )


def _routing(module: Any, router: Any) -> Routing:
    """Of a router whose correction may be a part of the mixture. Routers that do not say so have shares of the chosen
    ones."""
    own = [*router.named_parameters(), *router.named_buffers()]
    tensors = {name: tensor for name, tensor in own if not name.endswith(CORRECTION)}
    if tensors.keys() not in ROUTER_PARAMETERS:
        raise NotNative(f"{type(router).__name__} has the parameters {sorted(tensors)}")
    corrections = dict(own).items() - tensors.items() or module.named_buffers(recurse=False)
    correction = {name: tensor.detach().flatten() for name, tensor in corrections}
    scales = [float(getattr(router, name)) for name in ROUTED_SCALES if hasattr(router, name)]
    return Routing(
        router=router,
        chosen=router.top_k,
        sigmoid=bool(correction.keys() - {SOFTMAX_CORRECTION}),
        correction=next(iter(correction.values()), None),
        groups=int(getattr(router, "num_group", 1)),
        groups_chosen=int(getattr(router, "topk_group", 1)),
        shares_of_chosen=bool(getattr(router, "norm_topk_prob", True)),
        scale=scales[0] if scales else 1.0,
    )

"""The weights of a model by what is done with them: which can stay in blocks, and which are quantised at the load.

``quantize`` in models.yaml chooses: ``q8`` is Q8_0; ``q4`` is Q4_0, with embeddings and the head in Q8_0; ``fp8`` is
FP8 with a scale for each block, with embeddings and the head as they are. That is what llama.cpp does where it has no
better for a type, and how FP8 is published. Norms, convolutions and other vectors stay as they are, and so do routers
and matrices of few rows, which take next to nothing and decide much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from engine.native.packing import KINDS, bytes_in_panels
from engine.native.products import knows
from engine.packed.experts import holds_experts
from engine.packed.published_schemes import F8_32, F8_128
from engine.packed.schemes import BY_NAME, Scheme
from engine.packed_triton import planes

_FEW_ROWS = 64
_ROUTERS = ("gate", "router", "shared_expert_gate")
_Q8_0, _Q4_0 = BY_NAME["Q8_0"], BY_NAME["Q4_0"]
_OF_MAPS: dict[str, tuple[Scheme, ...]] = {"q8": (_Q8_0,), "q4": (_Q4_0,), "fp8": (F8_128, F8_32)}
_OF_TABLES: dict[str, tuple[Scheme, ...]] = {"q8": (_Q8_0,), "q4": (_Q8_0,), "fp8": ()}


@dataclass(frozen=True, slots=True)
class Target:
    """Where weights are to stay in blocks; what is no block there is of the type ``dtype``."""

    device: torch.device
    dtype: torch.dtype

    def multiplies_by(self, scheme: Scheme, shape: tuple[int, ...]) -> bool:
        """Whether something there multiplies by matrices [..., channels, columns] in the blocks of a scheme."""
        return knows(scheme, shape) if self.device.type == "cpu" else planes.knows(scheme, shape)


CPU = Target(torch.device("cpu"), torch.float32)


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter of a model. ``shape`` is [..., outputs, columns], also where the class has it ``transposed``.

    ``kind`` says what it belongs to: a linear "map", "experts", an embedding ("table"), or "other", which never stays
    in blocks. Embeddings of tokens and the head are ``of_vocabulary``.
    """

    name: str
    shape: torch.Size
    kind: str
    transposed: bool
    of_vocabulary: bool

    def scheme(self, choice: str) -> Scheme | None:
        """The blocks that a choice of ``quantize`` makes of it; None where it stays as it is."""
        if choice == "none" or self.kind == "other" or (self.kind == "table" and not self.of_vocabulary):
            return None
        if not self.of_vocabulary and (self.shape[-2] < _FEW_ROWS or self.name.split(".")[-2] in _ROUTERS):
            return None
        schemes = (_OF_TABLES if self.of_vocabulary else _OF_MAPS)[choice]
        return next((scheme for scheme in schemes if not self.shape[-1] % scheme.columns), None)

    def kept(self, scheme: Scheme | None, target: Target) -> Scheme | None:
        """The scheme, if a weight stays in it there: an embedding on a CPU in any, others where they are multiplied."""
        is_read = self.kind == "table" and target.device.type == "cpu"
        return scheme if scheme is not None and (is_read or target.multiplies_by(scheme, self.shape)) else None


def places_of(model: Any) -> dict[str, Place]:
    """The parameters of a model by name, tied ones too. ``model`` needs no memory."""
    head = model.get_output_embeddings()
    vocabulary = len(table.weight) if (table := model.get_input_embeddings()) is not None else 0
    return {
        place.name: place
        for prefix, module in model.named_modules()
        for place in _of_module(f"{prefix}." if prefix else "", module, head, vocabulary)
    }


def _of_module(prefix: str, module: Any, head: object, vocabulary: int) -> Iterator[Place]:
    for own, parameter in module.named_parameters(recurse=False):
        shape, kind, transposed = parameter.shape, "other", False
        if own == "weight" and isinstance(module, nn.Linear):
            kind = "map"
        elif own == "weight" and isinstance(module, nn.Embedding):
            kind = "table"
        elif holds_experts(module, own):
            kind, transposed = "experts", bool(module.is_transposed)
            shape = torch.Size((*shape[:-2], shape[-1], shape[-2])) if transposed else shape
        of_vocabulary = module is head or (kind == "table" and len(parameter) == vocabulary)
        yield Place(prefix + own, shape, kind, transposed, of_vocabulary)


def kept_in(
    model: Any, scheme_of: Callable[[Place], Scheme | None], target: Target = CPU
) -> list[tuple[torch.Size, Scheme | None]]:
    """What a model holds in memory: shapes, with the scheme in which a weight stays, or None for numbers.

    ``scheme_of`` says what blocks a weight comes in. What is tied is held once, or where only one of both can stay in
    blocks, as blocks and as numbers.
    """
    places, tied = places_of(model), model.all_tied_weights_keys
    kept: dict[str, Scheme | None] = {}
    for name, place in places.items():
        if name not in tied:
            kept[name] = None if place.kind == "other" else place.kept(scheme_of(place), target)
    for name, source in tied.items():
        if kept.get(source) is not None and places[name].kept(kept[source], target) is None:
            kept[name] = None
    return [(places[name].shape, scheme) for name, scheme in kept.items()]


def bytes_in(shape: tuple[int, ...], scheme: Scheme | None, target: Target) -> int:
    """What a weight takes there in blocks of a scheme, or else as numbers."""
    if scheme is None:
        return int(prod(shape) * target.dtype.itemsize)
    in_panels = target.device.type == "cpu" and scheme.name in KINDS
    block = bytes_in_panels(scheme.name, scheme.block_bytes) if in_panels else scheme.block_bytes
    size: int = prod(shape) // scheme.columns * block
    return size

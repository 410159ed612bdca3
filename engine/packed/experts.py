"""Mixtures whose experts stay in blocks, through transformers' interface for experts.

A class that uses the interface keeps stacked weights, ``gate_up_proj`` or ``up_proj`` and ``down_proj`` [experts, …],
and says of itself how they lie: what is done here with one expert after another is what its own forward does. Blocks
hold a row for each output, also where the class itself has its weights transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from engine.packed.modules import Divisible, MakeProduct, OnDevice, Product, Stack, Stored
from engine.packed.schemes import Blocks

INTERFACE = "castor_blocks"
_MAPS = ("gate_up_proj", "up_proj", "down_proj")


def holds_experts(module: Any, name: str) -> bool:
    """Whether a parameter is one of the maps of a module that uses transformers' interface for experts."""
    return name in _MAPS and hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")


def pack_experts(module: Any, name: str, stored: Stored, make: MakeProduct, full_name: str = "") -> bool:
    """Let experts compute with blocks in the place of their parameter ``name``, which is gone then.

    False, and nothing is changed, where they cannot: a class without the interface, or blocks that ``make`` does not
    know.
    """
    if not holds_experts(module, name):
        return False
    blocks = stored.blocks()
    if blocks is None or blocks.data.dim() != 3 or blocks.order is not None:
        return False
    products: Stack | Sequence[Product] | None
    if isinstance(make, OnDevice):
        products = make.stack_of(stored)
    else:
        # As one matrix, one expert's rows after another's: many small ones take several times as long to make.
        joined = make(Blocks(blocks.data.flatten(0, 1), blocks.scheme), full_name)
        products = joined.parts(len(blocks.data)) if isinstance(joined, Divisible) else None
    if products is None:
        return False
    delattr(module, name)
    module.__dict__.setdefault("packed", {})[name] = stored
    module.__dict__.setdefault("packed_products", {})[name] = products
    module.config._experts_implementation_internal = INTERFACE
    module._is_hf_initialized = True  # or transformers would ask for the weight in order to fill it
    return True


def _forward(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts' outputs for tokens [tokens, hidden], weighted: as transformers' ``batched_mm_experts_forward``.

    ``top_k_index`` and ``top_k_weights`` [tokens, k] choose the experts. The tokens of an expert are computed together.
    """
    tokens, chosen = top_k_index.shape
    places = top_k_index.reshape(-1)
    maps = "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"
    if all(isinstance(experts.packed_products.get(name), Stack) for name in maps):
        found = _together(experts, maps, hidden_states, places)
    else:
        found = _one_by_one(experts, maps, hidden_states, places)
    if experts.has_post_expert_norm:
        found = experts.post_expert_norm(found)
    weighted = found * top_k_weights.reshape(-1, 1)
    return weighted.view(tokens, chosen, -1).sum(dim=1).to(hidden_states.dtype)


def _together(experts: Any, maps: tuple[str, str], rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """What slots [slots] that name their expert make of rows [tokens, hidden], without waiting for the device."""
    plan = experts.packed_products[maps[0]].plan(places)
    for name in maps:
        stack: Stack = experts.packed_products[name]
        found = stack(rows.to(stack.dtype).contiguous(), plan).to(rows.dtype)
        if experts.has_bias:
            found = found + getattr(experts, f"{name}_bias")[places.clamp(max=experts.num_experts - 1)]
        rows = _activated(experts, found) if name == maps[0] else found
    return rows


def _one_by_one(experts: Any, maps: tuple[str, str], rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The same, one expert after another, which waits for the device."""
    found = rows.new_zeros(len(places), rows.shape[-1])
    for expert in places.unique().tolist():
        if expert >= experts.num_experts:  # the mark of an expert that is computed elsewhere
            continue
        own = (places == expert).nonzero()[:, 0]
        inner = _activated(experts, _multiplied(experts, maps[0], expert, rows[own * len(rows) // len(places)]))
        found[own] = _multiplied(experts, maps[1], expert, inner)
    return found


def _activated(experts: Any, inner: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    return found


def _multiplied(experts: Any, name: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """Rows by one expert's map, with its bias."""
    products: Stack | list[Product] | None = experts.packed_products.get(name)
    if products is not None:
        product = products[expert]
        found = product(rows.to(product.dtype).contiguous()).to(rows.dtype)
    else:
        weight = getattr(experts, name)[expert]
        found = rows @ weight if experts.is_transposed else nn.functional.linear(rows, weight)
    if experts.has_bias:
        found = found + getattr(experts, f"{name}_bias")[expert]
    return found


ALL_EXPERTS_FUNCTIONS.register(INTERFACE, _forward)

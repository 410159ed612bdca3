"""Mixtures whose experts stay in blocks, through transformers' interface for experts.

A class that uses the interface keeps stacked weights, ``gate_up_proj`` or ``up_proj`` and ``down_proj`` [experts, …],
and says of itself how they lie: what is done here with one expert after another is what its own forward does. Blocks
hold a row for each output, also where the class itself has its weights transposed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from engine.packed.modules import MakeProduct, Product, Stored
from engine.packed.schemes import Blocks

INTERFACE = "castor_blocks"
_MAPS = ("gate_up_proj", "up_proj", "down_proj")


def pack_experts(module: Any, name: str, stored: Stored, make: MakeProduct, full_name: str = "") -> bool:
    """Let experts compute with blocks in the place of their parameter ``name``, which is gone then.

    False, and nothing is changed, where they cannot: a class without the interface, or blocks that ``make`` does not
    know.
    """
    if name not in _MAPS or not hasattr(module, "_apply_gate") or not hasattr(module, "is_transposed"):
        return False
    blocks = stored.blocks()
    if blocks is None or blocks.data.dim() != 3 or blocks.order is not None:
        return False
    products = [make(Blocks(data, blocks.scheme), f"{full_name}.{index}") for index, data in enumerate(blocks.data)]
    if any(product is None for product in products):
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
    found = hidden_states.new_zeros(tokens * chosen, hidden_states.shape[-1])
    places = top_k_index.reshape(-1)
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    for expert in places.unique().tolist():
        if expert >= experts.num_experts:  # the mark of an expert that is computed elsewhere
            continue
        own = (places == expert).nonzero()[:, 0]
        inner = _multiplied(experts, first, expert, hidden_states[own // chosen])
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        found[own] = _multiplied(experts, "down_proj", expert, inner)
    if experts.has_post_expert_norm:
        found = experts.post_expert_norm(found)
    weighted = found * top_k_weights.reshape(-1, 1)
    return weighted.view(tokens, chosen, -1).sum(dim=1).to(hidden_states.dtype)


def _multiplied(experts: Any, name: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """Rows by one expert's map, with its bias."""
    products: list[Product] | None = experts.packed_products.get(name)
    if products is not None:
        found = products[expert](rows.float().contiguous()).to(rows.dtype)
    else:
        weight = getattr(experts, name)[expert]
        found = rows @ weight if experts.is_transposed else nn.functional.linear(rows, weight)
    if experts.has_bias:
        found = found + getattr(experts, f"{name}_bias")[expert]
    return found


ALL_EXPERTS_FUNCTIONS.register(INTERFACE, _forward)

"""Linear maps and embeddings whose weight stays in blocks, in the place of those of an unmodified model.

A module keeps its class and its own ``forward``; only what its base class does with ``weight`` is replaced. So an
embedding that scales its rows still does, and a subclass of ``nn.Linear`` that transforms its input too. Who asks such
a module for its ``weight`` gets the numbers, unpacked for that moment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from engine.packed.schemes import Blocks

Product = Callable[[torch.Tensor], torch.Tensor]
"""Multiplies rows [rows, columns] in float32 by a weight: [rows, channels], without bias."""


class _Packed(nn.Module):  # type: ignore[misc]  # torch is read without its types
    """What linear maps and embeddings in blocks have in common."""

    blocks: Blocks

    @property
    def weight(self) -> torch.Tensor:
        return self.blocks.unpacked()

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.blocks.shape))}, {self.blocks.scheme.name}"


class PackedLinear(_Packed, nn.Linear):  # type: ignore[misc]
    """Multiplies by what computes with the blocks fastest, or by the unpacked weight."""

    product: Product | None

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        if self.product is None:
            return functional.linear(source, self.weight.to(source.dtype), self.bias)
        rows = source.reshape(-1, self.in_features)
        if self.blocks.order is not None:
            rows = rows.index_select(1, self.blocks.order)
        found = self.product(rows.float().contiguous()).to(source.dtype)
        if self.bias is not None:
            found += self.bias
        return found.view(*source.shape[:-1], self.out_features)


class PackedEmbedding(_Packed, nn.Embedding):  # type: ignore[misc]
    """Unpacks the rows of the tokens that are asked for."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = self.blocks.rows(tokens.reshape(-1).long())
        return rows.to(self.kept_dtype).view(*tokens.shape, self.embedding_dim)

    kept_dtype: torch.dtype


def can_pack(module: nn.Module, name: str) -> bool:
    """Whether the parameter ``name`` of a module may stay in blocks."""
    return name == "weight" and isinstance(module, nn.Linear | nn.Embedding)


def pack(module: Any, blocks: Blocks, dtype: torch.dtype) -> None:
    """Let a linear map or an embedding compute with ``blocks``; its weight is gone."""
    base = PackedLinear if isinstance(module, nn.Linear) else PackedEmbedding
    own = type(module)
    del module.weight
    module.__class__ = type(f"Packed{own.__name__}", (own, base) if own not in base.__mro__ else (base,), {})
    module.blocks = blocks
    module._is_hf_initialized = True  # or transformers would ask for the weight in order to fill it
    if isinstance(module, nn.Embedding):
        module.kept_dtype = dtype
    else:
        module.product = None

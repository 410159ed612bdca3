"""What is done to tensors of GGUF files beyond what transformers has operations for.

Each works on numbers and, where it has ``supports_packed``, on bytes [..., rows, bytes of a row] alike.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps

Found = dict[str, Any]


class _Operation(ConversionOps):  # type: ignore[misc]  # transformers is read without its types
    """Makes one tensor of the sources, in the order of their patterns."""

    def convert(self, input_dict: Found, *, target_patterns: list[str], **_keywords: Any) -> Found:
        sources = [found[0] if isinstance(found, list) else found for found in input_dict.values()]
        return {target_patterns[0]: self.made_of(*sources)}

    def made_of(self, *sources: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class TurnedHeads(_Operation):
    """The rows of queries or keys in transformers' order: llama.cpp has the two halves of each head interleaved."""

    supports_packed = True

    def __init__(self, heads: int) -> None:
        self._heads = heads

    def made_of(self, *sources: torch.Tensor) -> torch.Tensor:
        (source,) = sources
        return source.unflatten(0, (self._heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


class InterleaveRows(_Operation):
    """Of two tensors [experts, rows, ...] row by row: first, second, first, ...: [experts, 2 * rows, ...]."""

    supports_packed = True

    def made_of(self, *sources: torch.Tensor) -> torch.Tensor:
        return torch.stack(sources, dim=2).flatten(1, 2)


class TransposeNumbers(_Operation):
    """Numbers [experts, rows, columns] as [experts, columns, rows]. Blocks are rows, and stay as they are."""

    supports_packed = True

    def made_of(self, *sources: torch.Tensor) -> torch.Tensor:
        (source,) = sources
        return source if source.dtype == torch.uint8 else source.transpose(1, 2).contiguous()


class GroupHeads(_Operation):
    """Rows of all queries, then all keys, then all values, as groups of the queries of one key, the key, the value."""

    supports_packed = True

    def __init__(self, heads: int, groups: int) -> None:
        self._heads, self._groups = heads, groups

    def made_of(self, *sources: torch.Tensor) -> torch.Tensor:
        (source,) = sources
        rest = source.shape[1:]
        size = len(source) // (self._heads + 2 * self._groups)
        counts = [self._heads * size, self._groups * size, self._groups * size]
        parts = [part.reshape(self._groups, -1, *rest) for part in source.split(counts)]
        return torch.cat(parts, dim=1).reshape(-1, *rest)


class JoinLatents(_Operation):
    """The map from latents to keys and values of each head, [heads * (keys + values), latents].

    llama.cpp has it in two: [heads, latents, keys], as it multiplies queries, and [heads, values, latents].
    """

    def made_of(self, *sources: torch.Tensor) -> torch.Tensor:
        keys, values = sources
        return torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1)


class Flatten(_Operation):
    """All numbers in one dimension."""

    def made_of(self, *sources: torch.Tensor) -> torch.Tensor:
        (source,) = sources
        return source.flatten()

"""Fuses RMSNorm and RoPE, whose operators a GPU computes faster than it launches them, into one kernel each.

Our kernels replace the model's own code if they give the same numbers (``engine.model.rewrites``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from math import inf
from types import ModuleType
from typing import Any

import torch
from torch import nn
from triton import JITFunction

from engine.closeness import ROUNDING, difference
from engine.fused.kernels import norm_kernel, rotate_kernel
from engine.model.architecture import RMS_NORM, ROTATE
from engine.model.loader import LoadedModel

_INTERPRETED = not isinstance(norm_kernel, JITFunction)

# --- Normalisation -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NormPlace:
    """An RMSNorm with a learned scale, the child ``name`` of ``parent``."""

    parent: nn.Module
    name: str
    norm: Any
    eps: float


class FuseNorms:
    """The ``Rewrite`` of RMSNorms."""

    name = "RMSNorms"
    tolerance = ROUNDING

    def find(self, model: LoadedModel) -> list[NormPlace]:
        places = []
        for parent in model.module.modules():
            for name, child in parent.named_children():
                if type(child).__name__.endswith(RMS_NORM) and len(list(child.parameters())) == 1:
                    eps = getattr(child, "variance_epsilon", getattr(child, "eps", None))
                    weight = getattr(child, "weight", None)
                    scales = isinstance(weight, torch.Tensor) and weight.dim() == 1
                    if scales and isinstance(eps, float) and not child._forward_hooks and "forward" not in vars(child):
                        places.append(NormPlace(parent, name, child, eps))
        return places

    def stand_ins(self, place: NormPlace) -> list[FusedNorm]:
        """Families differ in whether the scale is the weight or the weight plus one, and in when they round."""
        return [FusedNorm(place.norm, place.eps, offset, first) for offset in (0.0, 1.0) for first in (True, False)]

    def compare(self, place: NormPlace, stand_in: FusedNorm) -> tuple[float, torch.dtype]:
        weight = place.norm.weight
        numbers = torch.randn(1, 3, 2, weight.shape[0], generator=torch.Generator().manual_seed(0))
        source = numbers.to(weight.device, weight.dtype).transpose(1, 2)
        with torch.inference_mode():
            return difference(stand_in(source), place.norm(source)), weight.dtype

    def swap(self, place: NormPlace, stand_in: FusedNorm) -> None:
        setattr(place.parent, place.name, stand_in)


class FusedNorm(nn.Module):  # type: ignore[misc]
    """Stands in for an RMSNorm with a learned scale."""

    def __init__(self, original: nn.Module, eps: float, offset: float, round_first: bool) -> None:
        super().__init__()
        self.weight = original.weight
        self.eps = self.variance_epsilon = eps
        self.offset = offset
        self.round_first = round_first
        self._known: tuple[torch.Tensor, torch.Tensor] | None = None

    def expect(self, source: torch.Tensor, normed: torch.Tensor) -> None:
        """Know that ``normed`` is the norm of ``source``, for the next call."""
        self._known = source, normed

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        known, self._known = self._known, None
        if known is not None and known[0] is source:
            return known[1]
        size = source.shape[-1]
        out = torch.empty(source.shape, dtype=source.dtype, device=source.device)
        # The kernel takes contiguous rows at two strides. Other inputs are flattened to a single dimension of rows:
        # strides of dimensions of size 1 may be anything, even in contiguous tensors.
        walks = source.stride(-1) == 1 and source.dim() >= 2 and source.shape[:-3].numel() == 1
        source = source if walks else source.contiguous().view(-1, size)
        inner = source.shape[-2]
        norm_kernel[(source.numel() // size,)](
            out,
            source,
            self.weight,
            inner,
            source.stride(-3) if source.dim() > 2 else 0,
            source.stride(-2),
            self.eps,
            SIZE=size,
            WIDTH=power_of_two(size),
            OFFSET=self.offset,
            ROUND_FIRST=self.round_first,
            num_warps=warps_of(size),
        )
        return out


# --- Rotary positions ----------------------------------------------------------------------------

Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class RotationPlace:
    """The function of a model's code that rotates heads of ``size`` numbers of the type of ``like``, on its device."""

    code: ModuleType
    size: int
    like: torch.Tensor


class FuseRotations:
    """The ``Rewrite`` of rotary positions. It applies to all models of the same code in this process."""

    name = "functions that rotate by positions"
    tolerance = ROUNDING

    def find(self, model: LoadedModel) -> list[RotationPlace]:
        layers = model.probe.layers
        # An attention whose weights stay in blocks may have no parameter of its own.
        size, like = layers[0].shape.key_size, next(chain(layers[0].module.parameters(), model.module.parameters()))
        codes = [sys.modules[name] for name in sorted({type(layer.module).__module__ for layer in layers})]
        functions = [(code, getattr(code, ROTATE, None)) for code in codes]
        return [
            RotationPlace(code, size, like)
            for code, rotate in functions
            if rotate is not None and not hasattr(rotate, "castor_original")
        ]

    def stand_ins(self, place: RotationPlace) -> list[Rotate]:
        """Families differ in whether there are angles for a whole head, the same in both halves, or for one half."""
        return [fused_rotation(getattr(place.code, ROTATE), halved) for halved in (False, True)]

    def compare(self, place: RotationPlace, stand_in: Rotate) -> tuple[float, torch.dtype]:
        """Calls the kernel directly, because ``stand_in`` falls back to the original for inputs it does not support."""
        generator, like, size = torch.Generator().manual_seed(0), place.like, place.size

        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(like.device, like.dtype)

        q, k = numbers(1, 5, 4, size).transpose(1, 2), numbers(1, 2, 5, size)
        angles = size // 2 if stand_in.castor_halved else size  # type: ignore[attr-defined]
        cos, sin = numbers(1, 5, angles), numbers(1, 5, angles)
        try:
            expected = stand_in.castor_original(q, k, cos, sin)  # type: ignore[attr-defined]
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError):
            return inf, like.dtype  # a different signature or form of angles
        found = rotated(q, k, cos, sin)
        return max(difference(new, old) for new, old in zip(found, expected, strict=True)), like.dtype

    def swap(self, place: RotationPlace, stand_in: Rotate) -> None:
        setattr(place.code, ROTATE, stand_in)


def fused_rotation(original: Rotate, halved: bool) -> Rotate:
    """A stand-in for ``original``: our kernel for the inputs that it supports, ``original`` for all others.

    ``halved``: the angles are those of half a head.
    """

    def apply_rotary_pos_emb(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles = q.shape[-1] // 2 if halved else q.shape[-1]
        if more or unsqueeze_dim != 1 or not _is_rotatable(q, k, cos, sin, angles):
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, **more)
        return rotated(q, k, cos, sin)

    apply_rotary_pos_emb.castor_original = original  # type: ignore[attr-defined]
    apply_rotary_pos_emb.castor_halved = halved  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


def _is_rotatable(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, angles: int) -> bool:
    """Whether the kernel takes these tensors: one sequence, whole heads, one type; another model may be on a CPU."""
    if not (q.is_cuda or _INTERPRETED):
        return False
    size = q.shape[-1]
    alike: bool = q.dtype == k.dtype == cos.dtype == sin.dtype and q.stride(-1) == k.stride(-1) == 1
    whole: bool = q.dim() == 4 and q.shape[0] == 1 and k.shape[-1] == size and cos.shape == (1, q.shape[2], angles)
    return alike and whole


def rotated(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: tuple[FusedNorm, FusedNorm] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [1, heads, tokens, size] and k rotated by the angles of cos and sin [1, tokens, size or half of it].

    ``norms`` of queries and of keys, alike but for their weights, go first.
    """
    _, heads, tokens, size = q.shape
    out, other = (torch.empty(tokens, x.shape[1], size, dtype=x.dtype, device=x.device) for x in (q, k))
    norm = norms[0] if norms else None
    rotate_kernel[(tokens, heads + k.shape[1])](
        out,
        other,
        q,
        k,
        cos.contiguous(),
        sin.contiguous(),
        q.stride(2),
        q.stride(1),
        k.stride(2),
        k.stride(1),
        norms[0].weight if norms else q,
        norms[1].weight if norms else q,
        norm.eps if norm else 0.0,
        HEADS=heads,
        OTHER_HEADS=k.shape[1],
        SIZE=size,
        WIDTH=power_of_two(size),
        ANGLES=cos.shape[-1],
        NORMED=norm is not None,
        OFFSET=norm.offset if norm else 0.0,
        ROUND_FIRST=norm.round_first if norm else False,
        num_warps=1,
    )
    return out.transpose(0, 1)[None], other.transpose(0, 1)[None]


def power_of_two(size: int) -> int:
    """The least power of two that is not below ``size``."""
    return int(1 << (size - 1).bit_length())


def warps_of(size: int) -> int:
    """How many warps share a row of ``size`` numbers."""
    return 8 if size > 2048 else 4 if size > 512 else 1

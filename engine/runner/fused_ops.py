"""Chains of small operators that a GPU computes as one: normalisation by the root mean square, rotary positions.

A decode step of a small batch is made of operators that take the device less time than their launch. What replaces them
is our kernel where it gives the same numbers as the model's own code, tried at load on random numbers.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from triton import JITFunction

from engine.device.cuda_health import require_device
from engine.model.probe import Probe
from engine.runner.fused_ops_kernels import norm_kernel, rotate_kernel

_log = logging.getLogger(__name__)

# How far apart results may be, in shares of the largest: one rounding of the type.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_ROTATE = "apply_rotary_pos_emb"
_INTERPRETED = not isinstance(norm_kernel, JITFunction)


def shorten(model: Any, probe: Probe) -> int:
    """Replace what can be replaced in a loaded model; returns the number of places.

    What a compiler or driver has against it is logged. Raises ``OutOfMemoryError``, and ``EngineUnavailable`` where the
    device is lost.
    """
    places = 0
    try:
        places += _replace_norms(model)
        places += _replace_rotations(probe)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise what they like
        require_device(model.device)
        reason = str(error).strip().partition("\n")[0]
        _log.warning("Small operators are computed one by one: %s: %s", type(error).__name__, reason)
    _log.info("%d chains of small operators are computed as one", places)
    return places


# --- Normalisation -------------------------------------------------------------------------------


class _Norm(nn.Module):  # type: ignore[misc]
    """Stands in for a normalisation by the root mean square with a learned scale."""

    def __init__(self, original: nn.Module, eps: float, offset: float, round_first: bool) -> None:
        super().__init__()
        self.weight = original.weight
        self.eps = self.variance_epsilon = eps
        self._offset = offset
        self._round_first = round_first

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        size = source.shape[-1]
        out = torch.empty(source.shape, dtype=source.dtype, device=source.device)
        source = _two_strides(source)
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
            WIDTH=_power_of_two(size),
            OFFSET=self._offset,
            ROUND_FIRST=self._round_first,
            num_warps=8 if size > 2048 else 4 if size > 512 else 1,
        )
        return out


def _replace_norms(model: Any) -> int:
    places = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            stand_in = _norm_like(child) if type(child).__name__.endswith("RMSNorm") else None
            if stand_in is not None:
                setattr(parent, name, stand_in)
                places += 1
    return places


def _norm_like(original: nn.Module) -> _Norm | None:
    """Our normalisation in the arrangement that is closest to ``original``, if it is close enough."""
    weight = getattr(original, "weight", None)
    eps = getattr(original, "variance_epsilon", getattr(original, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if len(list(original.parameters())) != 1 or original._forward_hooks or "forward" in vars(original):
        return None
    numbers = torch.randn(1, 3, 2, weight.shape[0], generator=torch.Generator().manual_seed(0))
    source = numbers.to(weight.device, weight.dtype).transpose(1, 2)
    with torch.inference_mode():
        expected = original(source).float()
        candidates = [_Norm(original, eps, offset, first) for offset in (0.0, 1.0) for first in (True, False)]
        apart = [float((candidate(source).float() - expected).abs().max()) for candidate in candidates]
    best = min(range(len(apart)), key=apart.__getitem__)
    enough = apart[best] <= _TOLERANCE.get(weight.dtype, 0.0) * float(expected.abs().max())
    return candidates[best] if enough else None


def _two_strides(source: torch.Tensor) -> torch.Tensor:
    """The rows as the kernel can walk through them: each in one piece, counted by the two dimensions before it."""
    walks = source.stride(-1) == 1 and source.dim() >= 2 and source.shape[:-3].numel() == 1
    # All in one dimension: strides of dimensions of size 1 may be anything, also in what is contiguous.
    return source if walks else source.contiguous().view(-1, source.shape[-1])


# --- Rotary positions ----------------------------------------------------------------------------

Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _replace_rotations(probe: Probe) -> int:
    """The function stands in the module of the model's code, for all models of that code in this process."""
    places = 0
    for name in {type(layer.module).__module__ for layer in probe.layers}:
        module = sys.modules[name]
        original = getattr(module, _ROTATE, None)
        if original is None or hasattr(original, "castor_original"):
            continue
        weight = next(probe.layers[0].module.parameters())
        size = probe.layers[0].shape.key_size
        if _rotates_alike(original, size, weight):
            setattr(module, _ROTATE, _rotation(original))
            places += 1
    return places


def _rotation(original: Rotate) -> Rotate:
    """``original`` for what our kernel takes, else itself."""

    def apply_rotary_pos_emb(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if more or unsqueeze_dim != 1 or not _is_rotatable(q, k, cos, sin):
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, **more)
        return _rotated(q, k, cos, sin)

    apply_rotary_pos_emb.castor_original = original  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


def _is_rotatable(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """One sequence, whole heads, one type, and where our kernels run: another model of this code may be on a CPU."""
    if not (q.is_cuda or _INTERPRETED):
        return False
    size = q.shape[-1]
    alike: bool = q.dtype == k.dtype == cos.dtype == sin.dtype and q.stride(-1) == k.stride(-1) == 1
    whole: bool = q.dim() == 4 and q.shape[0] == 1 and k.shape[-1] == size and cos.shape == (1, q.shape[2], size)
    return alike and whole


def _rotated(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [1, heads, tokens, size] and k turned by the angles of cos and sin [1, tokens, size]."""
    _, heads, tokens, size = q.shape
    out, other = (torch.empty(tokens, x.shape[1], size, dtype=x.dtype, device=x.device) for x in (q, k))
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
        HEADS=heads,
        OTHER_HEADS=k.shape[1],
        SIZE=size,
        WIDTH=_power_of_two(size),
        num_warps=1,
    )
    return out.transpose(0, 1)[None], other.transpose(0, 1)[None]


def _rotates_alike(original: Rotate, size: int, like: torch.Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(like.device, like.dtype)

    q, k = numbers(1, 5, 4, size).transpose(1, 2), numbers(1, 2, 5, size)
    cos, sin = numbers(1, 5, size), numbers(1, 5, size)
    try:
        expected = original(q, k, cos, sin)
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError):
        return False  # another signature, another form of angles
    for wanted, found in zip(expected, _rotated(q, k, cos, sin), strict=True):
        if wanted.shape != found.shape:
            return False
        if not (found - wanted).abs().max() <= _TOLERANCE.get(like.dtype, 0.0) * wanted.abs().max():
            return False
    return True


def _power_of_two(size: int) -> int:
    return int(1 << (size - 1).bit_length())

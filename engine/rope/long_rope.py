"""LongRoPE: a text within the original context is rotated by short factors, a longer one by long factors, all of it.

Ding et al., "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens", 2024. transformers' rotary modules choose
once for a whole forward, by its largest position. A step of ours has tokens of many texts. So on its instance the
module's own formula runs over a stand-in for the module, whose frequencies and scale differ from token to token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from engine.api.errors import ModelRefused
from engine.closeness import difference

_TOLERANCE = 1e-6
"""Both compute the same products in float32, one of them side by side with others."""


class _Rotation(NamedTuple):
    """``frequencies`` [frequencies], and the ``scale`` of cosines and sines; or one of each for every token, [tokens,
    frequencies] and [tokens, 1]."""

    frequencies: torch.Tensor
    scale: float | torch.Tensor


class _Rotations(NamedTuple):
    short: _Rotation
    long: _Rotation

    def of(self, is_long: torch.Tensor | None) -> _Rotation:
        """Those of each token, by ``is_long`` [tokens]; None: short."""
        if is_long is None:
            return self.short
        which = is_long[:, None]
        scale = self.short.scale
        if scale != self.long.scale:
            scale = torch.where(which, self.long.scale, self.short.scale)
        return _Rotation(torch.where(which, self.long.frequencies, self.short.frequencies), scale)


class LongRope:
    """The rotations of one model whose texts of more than ``original`` tokens are rotated otherwise."""

    def __init__(self, original: int) -> None:
        self.original = original
        self._is_long: torch.Tensor | None = None

    @contextmanager
    def rotating(self, is_long: torch.Tensor) -> Iterator[None]:
        """Within the block the tokens of a forward are rotated as those of long texts where ``is_long`` [tokens] says
        so; outside of it all are short."""
        self._is_long = is_long
        try:
            yield
        finally:
            self._is_long = None

    def install(self, module: nn.Module) -> None:
        """Have a rotary module rotate each token as its text is rotated. Raises what its own forward does."""
        own: Any = type(module).forward
        formula, signature = inspect.unwrap(own), inspect.signature(own)
        by_layer_type = {
            layer_type: _Rotations(
                _own_rotation(module, layer_type, self.original - 1), _own_rotation(module, layer_type, self.original)
            )
            for layer_type in _switching(module)
        }

        def forward(*inputs: Any, **keywords: Any) -> Any:
            layer_type = signature.bind(module, *inputs, **keywords).arguments.get("layer_type")
            if layer_type not in by_layer_type:
                return own(module, *inputs, **keywords)
            rotation = by_layer_type[layer_type].of(self._is_long)
            return formula(_StandIn(module, layer_type, rotation), *inputs, **keywords)

        module.forward = forward


def takes_long_factors(rope: Mapping[str, Any]) -> bool:
    """Whether the rotation that a configuration describes depends on the length of the text, by two sets of factors
    or (PhiMoE) scales."""
    return rope.get("rope_type") == "longrope" or "long_mscale" in rope


def rotate_by_text(model: Any, original: int, max_context: int) -> LongRope:
    """Have all rotary modules of a model's decoder rotate each token as its text is rotated, and prove it.

    Raises ``ModelRefused``, naming the module, where the result differs from that of the module's own forward for texts
    of up to ``original`` or up to ``max_context`` tokens, or where nothing is known to choose between the factors.
    """
    remedy = f"set max_context to {original} or less"
    switching = [(path, module) for path, module in model.get_decoder().named_modules() if _switching(module)]
    if not switching:
        raise ModelRefused(
            f"{type(model).__name__} has factors for texts beyond {original} tokens (longrope), but no rotary "
            f"embedding that is known to choose between them; {remedy}"
        )
    rope = LongRope(original)
    for path, module in switching:
        name = f"{path} ({type(module).__name__})"
        originals = {parameters["original_max_position_embeddings"] for parameters in _switching(module).values()}
        if originals != {original}:
            raise ModelRefused(
                f"{name} rotates texts otherwise beyond {', '.join(map(str, sorted(originals)))} tokens, and other "
                f"layers beyond {original}; {remedy}"
            )
        try:
            with torch.inference_mode():
                rope.install(module)
                apart = max(_apart(rope, module, layer_type, max_context) for layer_type in _switching(module))
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ModelRefused(f"{name} cannot rotate each token of a step as its text: {error}; {remedy}") from error
        if not apart <= _TOLERANCE:
            raise ModelRefused(
                f"{name} computes cosines and sines that differ by {apart:.1e} where short and long texts are "
                f"rotated side by side; rounding explains {_TOLERANCE:.0e}; {remedy}"
            )
    return rope


class _StandIn:
    """A rotary module as its own formula sees it, with a ``rotation`` in place of its frequencies and its scale."""

    def __init__(self, module: nn.Module, layer_type: str | None, rotation: _Rotation) -> None:
        self._module = module
        prefix = "" if layer_type is None else f"{layer_type}_"
        setattr(self, f"{prefix}inv_freq", rotation.frequencies)
        setattr(self, f"{prefix}attention_scaling", rotation.scale)
        if _makes_its_own(module):
            self.rope_init_fn = lambda _config: rotation
            # With this type it takes the scale that comes with the frequencies.
            self.config = SimpleNamespace(rope_parameters={"rope_type": "default"})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _makes_its_own(module: Any) -> bool:
    """Whether its formula makes frequencies at each call and chooses a scale by itself, as that of PhiMoE does."""
    return "rope_init_fn" in inspect.unwrap(type(module).forward).__code__.co_names


def _switching(module: Any) -> dict[str | None, Mapping[str, Any]]:
    """What the configuration says of the rotations of a module that take long factors, by the type of layer; None is
    the type where all layers have one. Empty for any other module."""
    kinds = getattr(module, "rope_type", None)
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None)
    if kinds is None or parameters is None:
        return {}
    by_type: dict[str | None, Mapping[str, Any]]
    by_type = {None: parameters} if isinstance(kinds, str) else {kind: parameters[kind] for kind in kinds}
    return {kind: found for kind, found in by_type.items() if found and takes_long_factors(found)}


def _own_rotation(module: Any, layer_type: str | None, last: int) -> _Rotation:
    """What the module's own forward takes for a text whose last position is ``last``."""
    _own(module, layer_type, [last])
    if _makes_its_own(module):
        parameters = module.config.rope_parameters
        frequencies, _ = module.rope_init_fn(module.config)
        is_long = last >= parameters["original_max_position_embeddings"]
        scale = parameters["long_mscale" if is_long else "short_mscale"]
        return _Rotation(frequencies.to(module.inv_freq.device), scale)
    prefix = "" if layer_type is None else f"{layer_type}_"
    return _Rotation(getattr(module, f"{prefix}inv_freq").clone(), getattr(module, f"{prefix}attention_scaling"))


def _own(module: Any, layer_type: str | None, positions: list[int]) -> torch.Tensor:
    return _call(type(module).forward.__get__(module), module, layer_type, positions)


def _call(forward: Callable[..., Any], module: Any, layer_type: str | None, positions: list[int]) -> torch.Tensor:
    """Cosines and sines of ``positions`` in float32, [2, 1, tokens, frequencies]."""
    device = next(module.buffers()).device
    keywords = {} if layer_type is None else {"layer_type": layer_type}
    found = forward(torch.zeros(1, device=device), torch.tensor([positions], device=device), **keywords)
    return torch.stack([found.real, found.imag] if isinstance(found, torch.Tensor) else [*found]).float()


def _apart(rope: LongRope, module: nn.Module, layer_type: str | None, max_context: int) -> float:
    """The difference to the module's own forward, for a short and a long text that lie side by side."""
    short = sorted({0, 1, rope.original // 2, rope.original - 1})
    long = sorted({*short, rope.original, max_context - 1})
    is_long = torch.tensor([False] * len(short) + [True] * len(long), device=next(module.buffers()).device)
    with rope.rotating(is_long):
        found = _call(module.forward, module, layer_type, short + long)
    expected_long = _own(module, layer_type, long)
    expected = torch.cat([_own(module, layer_type, short), expected_long], dim=2)
    return difference(found, expected)

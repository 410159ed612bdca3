"""A dry run at load: what every layer's cache must hold, and whether the attention hook reaches the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from engine.api.errors import ModelRefused
from engine.attention.base import AttentionOptions
from engine.cache.layout import KVShape
from engine.device.cuda_health import require_device
from engine.failures import first_line
from engine.model import attention_hook

_TOKENS = 4


@dataclass(frozen=True, slots=True)
class ProbedLayer:
    """One attention layer as the dry run saw it; ``name`` is its path in the model."""

    name: str
    module: nn.Module
    shape: KVShape
    sliding_window: int | None
    options: AttentionOptions


@dataclass(frozen=True, slots=True)
class Probe:
    """The layers in the order in which they run, and the width of the logits."""

    layers: list[ProbedLayer]
    vocab_size: int


class _Call(NamedTuple):
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    options: AttentionOptions


_Calls = dict[nn.Module, list[_Call]]


def probe(model: Any, num_layers: int) -> Probe:
    """Run a few tokens through ``model`` and learn its layers; the model is left on the paged attention.

    Raises ``ModelRefused`` naming the layer and the reason if attention, its mask or the positions do not work as the
    paged cache needs.
    """
    names = {module: name for name, module in model.named_modules()}
    ordered = torch.arange(_TOKENS)[None]
    calls, vocab_size = _record(model, attention_hook.PROBE, ordered, ordered)
    layers = [_layer(names[module], module, seen) for module, seen in calls.items()]
    missing = set(range(num_layers)) - {getattr(layer.module, "layer_idx", None) for layer in layers}
    if missing:
        raise ModelRefused(f"layer {min(missing)} does not send its attention through transformers' interface for it")
    if len(layers) != num_layers:
        raise ModelRefused(f"{len(layers)} attention modules answer for {num_layers} layers")
    # One token repeated at one position: where anything but attention mixes tokens or counts positions, keys differ.
    same = torch.ones_like(ordered)
    calls, _ = _record(model, attention_hook.PAGED, same, same)
    for module, (call,) in calls.items():
        if call.mask is not None:
            raise ModelRefused(f"layer {names[module]} makes its own attention mask")
        key = call.key.float()
        if not torch.allclose(key, key[:, :, :1].expand_as(key), rtol=1e-2, atol=1e-3):
            raise ModelRefused(f"layer {names[module]} mixes neighbouring tokens or ignores position_ids")
    return Probe(layers, vocab_size)


def dry_run(model: Any, hooks: Iterable[RemovableHandle] = ()) -> None:
    """Run a few tokens through a probed model that is not bound to a backend yet; its attention yields zeros.

    ``hooks`` are what observes it: they are removed afterwards.
    """
    ordered = torch.arange(_TOKENS)[None]
    try:
        _record(model, attention_hook.PAGED, ordered, ordered)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def attending_to_itself(part: nn.Module) -> Iterator[list[tuple[Any, ...]]]:
    """Within the block the attention in ``part`` of a probed model yields each token's own value.

    Yields what it is called with: query, key, value, mask and options of each call.
    """
    calls: list[tuple[Any, ...]] = []

    def attend(_: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *more: Any) -> torch.Tensor:
        calls.append((query, key, value, *more))
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2).contiguous()

    with _attending(part, attend):
        yield calls


@contextmanager
def _attending(part: nn.Module, attend: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Within the block ``attend`` computes the attention in ``part``; it gets the module before its inputs."""
    for module in part.modules():
        attention_hook.bind(module, partial(attend, module))
    try:
        yield
    finally:
        for module in part.modules():
            attention_hook.unbind(module)


def _record(model: Any, name: str, ids: torch.Tensor, positions: torch.Tensor) -> tuple[_Calls, int]:
    """What each attention module is called with, and the width of the logits. Attention yields zeros, so that tokens
    never mix."""
    calls: _Calls = {}

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: AttentionOptions,
    ) -> torch.Tensor:
        calls.setdefault(module, []).append(_Call(key, value, mask, options))
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])

    set_attention(model, name)
    try:
        with _attending(model, attend), torch.inference_mode():
            logits = model(
                input_ids=ids.to(model.device),
                position_ids=positions.to(model.device),
                use_cache=False,
                logits_to_keep=torch.tensor([_TOKENS - 1], device=model.device),
            ).logits
    except TypeError as error:
        raise ModelRefused(f"{type(model).__name__} does not take the arguments of a decoding step: {error}") from error
    except torch.OutOfMemoryError:
        raise  # it may fit another time
    except (RuntimeError, ValueError, LookupError, AttributeError) as error:
        require_device(model.device)
        line = first_line(error)
        raise ModelRefused(f"{type(model).__name__} cannot compute a dry run of {_TOKENS} tokens: {line}") from error
    if logits.shape[:2] != (1, 1):
        raise ModelRefused(f"{type(model).__name__} computes logits for tokens that were not asked for")
    return calls, int(logits.shape[2])


def set_attention(model: Any, name: str) -> None:
    """Switch the text part of ``model`` to the attention function ``name``; image and audio towers keep theirs."""
    towers = model.config.sub_configs
    model.set_attn_implementation({"text_config": name} if "text_config" in towers else name)


def _layer(name: str, module: nn.Module, calls: list[_Call]) -> ProbedLayer:
    if len(calls) != 1:
        raise ModelRefused(f"layer {name} attends {len(calls)} times for each token; one is supported")
    key, value, mask, options = calls[0]
    if key.shape[0] != 1 or key.shape[2] != _TOKENS:
        raise ModelRefused(f"layer {name} keeps keys of shape {tuple(key.shape)} for {_TOKENS} tokens")
    # The window that the layer passes must be the one of its mask, or it would be lost silently.
    window = options.sliding_window
    if mask is None or mask.shape != (1, 1, 1, 1):
        raise ModelRefused(f"layer {name} does not use transformers' causal mask; its attention may not be causal")
    if int(mask.item()) != (window or 0):
        raise ModelRefused(f"layer {name} passes the sliding window {window}, but its mask has {int(mask.item())}")
    return ProbedLayer(name, module, KVShape(key.shape[1], key.shape[3], value.shape[3]), window, options)

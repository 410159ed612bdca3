"""A dry run at load: what every layer's cache must hold, and whether the attention hook reaches the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from engine.api.block_groups import Window
from engine.api.errors import ModelRefused
from engine.attention.base import AttentionOptions
from engine.cache.layout import KVShape
from engine.cache.state_tensors import StateShape
from engine.device.cuda_health import require_device
from engine.failures import first_line
from engine.model import attention_hook
from engine.model.architecture import ATTENTION_LAYERS, STATE_LAYERS
from engine.recurrent import mixer_hook
from engine.recurrent.mixer_hook import Mixer
from engine.recurrent.recurrences import Arguments, Operator, Recurrence, over_tokens
from engine.recurrent.states import activated

_TOKENS = 4
_TEXT_ID = 3  # ids below it are those of padding, begin and end in most vocabularies


@dataclass(frozen=True, slots=True)
class ProbedLayer:
    """One attention layer as the dry run saw it; ``name`` is its path in the model.

    ``place`` is that of its keys and values among those of all layers. A layer that does not ``writes`` attends to what
    an earlier one has written there.
    """

    name: str
    module: nn.Module
    shape: KVShape
    window: Window | None
    options: AttentionOptions
    place: int = 0
    writes: bool = True


@dataclass(frozen=True, slots=True)
class Probe:
    """The layers that attend in the order in which they run, those that carry a state, and the width of the logits.

    ``windows`` are those of the layer groups.
    """

    layers: list[ProbedLayer]
    vocab_size: int
    mixers: list[Mixer] = field(default_factory=list)
    windows: tuple[Window | None, ...] = (None,)

    @property
    def shapes(self) -> list[KVShape]:
        """What tokens leave behind, by the layers' places."""
        return [layer.shape for layer in self.layers if layer.writes]

    def grouped(self, max_context: int) -> Probe:
        """The same with layers that see equally much of ``max_context`` tokens in one group each.

        Where layers carry states all are in one group: lost states are computed again from the first token on, which
        needs the keys and values of all tokens.
        """
        if self.mixers:
            return self
        seen = [layer.window if layer.window and layer.window.size < max_context else None for layer in self.layers]
        windows = sorted(set(seen), key=lambda window: (window is not None, window or ()))
        layers = [
            replace(layer, shape=layer.shape._replace(group=windows.index(window)))
            for layer, window in zip(self.layers, seen, strict=True)
        ]
        return replace(self, layers=layers, windows=tuple(windows) or (None,))

    @property
    def states(self) -> list[StateShape]:
        """The states of all mixers, one after another."""
        return [state for mixer in self.mixers for state in mixer.states]


class DryRunFailed(ModelRefused):
    """The model's code raised an error in a dry run, so that nothing was learned of its attention."""


class _Call(NamedTuple):
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    options: AttentionOptions


_Calls = dict[nn.Module, list[_Call]]


def probe(model: Any, text_config: Any) -> Probe:
    """Run a few tokens through ``model`` and learn its layers; the model is left on the paged attention.

    Raises ``ModelRefused`` naming the layer and the reason if attention, its mask, the positions or the states do not
    work as the caches need.
    """
    names = {module: name for name, module in model.named_modules()}
    states = {module: _EachTokenAlone() for _, module in mixer_hook.mixers(model)}
    for module, state in states.items():
        mixer_hook.install(module)
        mixer_hook.bind(module, state)
    ordered = torch.arange(_TOKENS)[None]
    text = torch.full_like(ordered, _TEXT_ID)
    first, vocab_size = _record(model, attention_hook.PROBE, text, ordered)
    layers = _placed([_layer(names[module], module, seen) for module, seen in first.items()], first)
    mixers = [Mixer(names[module], module, state.shapes) for module, state in states.items()]
    _require_all_layers(text_config, layers, mixers)
    # One token repeated at one position: where anything but attention mixes tokens or counts positions, keys differ.
    same = torch.ones_like(ordered)
    calls, _ = _record(model, attention_hook.PAGED, same, same)
    for module, (call,) in calls.items():
        if call.mask is not None:
            raise ModelRefused(f"layer {names[module]} makes its own attention mask")
        key = call.key.float()
        if not torch.allclose(key, key[:, :, :1].expand_as(key), rtol=1e-2, atol=1e-3):
            raise ModelRefused(f"layer {names[module]} mixes neighbouring tokens or ignores position_ids")
    # The first run again with the positions that the model counts by itself. Where only distances matter it may count
    # from anywhere, so scores are compared and not keys.
    own, _ = _record(model, attention_hook.PAGED, text, None)
    for module, (call,) in own.items():
        expected = _scores(first[module][0])
        if not (_scores(call) - expected).abs().max() <= 2e-2 * expected.abs().max():  # nor for NaN
            raise ModelRefused(f"layer {names[module]} does not count the positions of a text from 0")
    for run in (calls, own):
        if [layer.place for layer in _placed(layers, run)] != [layer.place for layer in layers]:
            raise ModelRefused("its layers share keys and values in some steps and not in others")
    return Probe(layers, vocab_size, mixers)


def _placed(layers: list[ProbedLayer], calls: _Calls) -> list[ProbedLayer]:
    """The layers with the places of their keys and values.

    A layer that is given the very tensors of an earlier one, and sees as much of the past, needs none of its own.
    """
    places: dict[tuple[object, ...], int] = {}
    placed = []
    for layer in layers:
        (call,) = calls[layer.module]
        given = (call.key.data_ptr(), call.value.data_ptr(), layer.shape, layer.window)
        writes = given not in places
        placed.append(replace(layer, place=places.setdefault(given, len(places)), writes=writes))
    return placed


def _require_all_layers(text_config: Any, layers: list[ProbedLayer], mixers: list[Mixer]) -> None:
    """Each layer that attends and each that carries a state has to be seen, or its past would be lost."""
    count = text_config.num_hidden_layers
    kinds = getattr(text_config, "layer_types", None) or ["full_attention"] * count
    for parts, wanted, what in (
        (layers, ATTENTION_LAYERS, "send its attention through transformers' interface for it"),
        (mixers, STATE_LAYERS, "carry its state in a way that is known"),
    ):
        expected = [index for index, kind in enumerate(kinds) if kind in wanted]
        seen = {getattr(part.module, "layer_idx", None) for part in parts}
        if missing := set(expected) - seen:
            raise ModelRefused(f"layer {min(missing)} does not {what}")
        if len(parts) != len(expected):
            raise ModelRefused(f"{len(parts)} modules answer for {len(expected)} layers, which should each {what}")


class _EachTokenAlone:
    """Computes the operators of a mixer as if each token began a sequence of its own, and learns its states."""

    def __init__(self) -> None:
        self._shapes: dict[int, StateShape] = {}

    @property
    def shapes(self) -> list[StateShape]:
        return [self._shapes[call] for call in range(len(self._shapes))]

    def convolve(
        self, call: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
    ) -> torch.Tensor:
        self._shapes[call] = StateShape((weight.shape[1] - 1, weight.shape[0]), x.dtype)
        out = x * weight[:, -1:]
        return activated((out if bias is None else out + bias.unsqueeze(-1)).to(x.dtype), activation)

    def recur(self, call: int, recurrence: Recurrence, operator: Operator, arguments: Arguments) -> torch.Tensor:
        alone = {name: arguments[name].transpose(0, 1) for name in recurrence.by_token}
        out, last = over_tokens(recurrence, operator, {**arguments, **alone}, None)
        self._shapes[call] = StateShape(tuple(last.shape[1:]), last.dtype)
        found: torch.Tensor = out.transpose(0, 1)
        return found


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


def _record(model: Any, name: str, ids: torch.Tensor, positions: torch.Tensor | None) -> tuple[_Calls, int]:
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
        calls.setdefault(module, []).append(_Call(query, key, value, mask, options))
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])

    set_attention(model, name)
    try:
        with _attending(model, attend), torch.inference_mode():
            logits = model(
                input_ids=ids.to(model.device),
                position_ids=None if positions is None else positions.to(model.device),
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
        raise DryRunFailed(f"{type(model).__name__} cannot compute a dry run of {_TOKENS} tokens: {line}") from error
    if logits.shape[:2] != (1, 1):
        raise ModelRefused(f"{type(model).__name__} computes logits for tokens that were not asked for")
    return calls, int(logits.shape[2])


def _scores(call: _Call) -> torch.Tensor:
    """How much each query looks at each key [heads, tokens, tokens]."""
    key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
    return (call.query.float() @ key.float().transpose(2, 3))[0]


def set_attention(model: Any, name: str) -> None:
    """Switch the text part of ``model`` to the attention function ``name``; image and audio towers keep theirs."""
    config = model.config
    text = config.get_text_config()
    place = next((key for key in config.sub_configs if getattr(config, key) is text), "")
    model.set_attn_implementation({place: name})


def _layer(name: str, module: nn.Module, calls: list[_Call]) -> ProbedLayer:
    if len(calls) != 1:
        raise ModelRefused(f"layer {name} attends {len(calls)} times for each token; one is supported")
    _, key, value, mask, options = calls[0]
    if key.shape[0] != 1 or key.shape[2] != _TOKENS:
        raise ModelRefused(f"layer {name} keeps keys of shape {tuple(key.shape)} for {_TOKENS} tokens")
    try:
        window = attention_hook.window_of(mask)
    except ValueError:
        raise ModelRefused(
            f"layer {name} does not use transformers' causal mask; its attention may not be causal"
        ) from None
    # The window that the layer passes must be the one of its mask, or it would be lost silently. Chunks are not passed.
    if options.window != (None if window and window.chunked else window):
        raise ModelRefused(f"layer {name} passes the window {options.window}, but its mask has {window}")
    in_keys = key.data_ptr() == value.data_ptr() and key.shape[1] == 1 and key.shape[3] > value.shape[3]
    shape = KVShape(key.shape[1], key.shape[3], value.shape[3], values_in_keys=in_keys)
    return ProbedLayer(name, module, shape, window, options)

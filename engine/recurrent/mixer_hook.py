"""Connects transformers' recurrent mixers to our states: on their instances, the operators that they call are ours.

A mixer's ``forward`` runs once over the tokens of all sequences, [1, tokens, hidden]. All that mixes tokens in it are
calls of module-level functions: a causal convolution and at most one recurrence. The instance gets a copy of its
``forward`` in whose globals these names lead to what is bound to the instance, so that several models in one process
are independent, and what is bound answers with the states of each sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from engine.api.errors import ModelRefused
from engine.cache.state_tensors import StateShape
from engine.recurrent.recurrences import RECURRENCES, Arguments, Operator, Recurrence
from engine.recurrent.states import RecurrentStates

CONVOLUTION = "causal_conv1d_fn"
_KEPT = frozenset({"update_conv_state", "update_recurrent_state"})
"""What a mixer calls of its cache: the signs of one."""
_CACHES = ("cache", "cache_params", "past_key_values")
"""By which name a mixer takes its cache: the first since transformers 5.24."""
_STATE = "castor_mixer"


class Mixer(NamedTuple):
    """One layer's recurrent part: its path in the model, and the states that it carries, in the order of its calls."""

    name: str
    module: nn.Module
    states: list[StateShape]


class MixerState(Protocol):
    """What computes the operators of a mixer, numbered by the order of their calls in its forward."""

    def convolve(
        self, call: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
    ) -> torch.Tensor:
        """``RecurrentStates.convolve`` of the mixer's state ``call``."""
        ...

    def recur(self, call: int, recurrence: Recurrence, operator: Operator, arguments: Arguments) -> torch.Tensor:
        """``RecurrentStates.recur`` of the mixer's state ``call``."""
        ...


class SlottedMixer:
    """The states of one mixer, which are those of a model from number ``first`` on."""

    def __init__(self, states: RecurrentStates, first: int) -> None:
        self._states = states
        self._first = first

    def convolve(
        self, call: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
    ) -> torch.Tensor:
        return self._states.convolve(self._first + call, x, weight, bias, activation)

    def recur(self, call: int, recurrence: Recurrence, operator: Operator, arguments: Arguments) -> torch.Tensor:
        return self._states.recur(self._first + call, recurrence, operator, arguments)


class _NothingKept:
    """Stands in for the cache of transformers: a mixer finds nothing in it, and computes all that it is given."""

    def get_conv_state(self, *_: Any, **__: Any) -> None:
        return None

    def get_recurrent_state(self, *_: Any, **__: Any) -> None:
        return None

    def update_conv_state(self, states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return states

    def update_recurrent_state(self, states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return states


def mixers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The mixers of a model with their paths, in the order of its modules.

    Raises ``ModelRefused`` for one that keeps a state by other operators than those that we know, or in a cache that it
    takes by another name.
    """
    found = []
    for path, module in model.named_modules():
        code = _code_of(module)
        called = set(code.co_names)
        if not called & _KEPT:
            continue
        recurrences = called & RECURRENCES.keys()
        if CONVOLUTION not in called or len(recurrences) != ("update_recurrent_state" in called):
            raise ModelRefused(
                f"layer {path} ({type(module).__name__}) keeps a state, but not by {CONVOLUTION} and one of "
                f"{', '.join(RECURRENCES)}; other recurrent layers are not served"
            )
        if not set(code.co_varnames).intersection(_CACHES):
            raise ModelRefused(
                f"layer {path} ({type(module).__name__}) keeps a state in a cache that it takes by none of the names "
                f"{', '.join(_CACHES)}; take the release of transformers that Castor pins"
            )
        found.append((path, module))
    return found


def install(module: nn.Module) -> None:
    """Have the operators of a mixer computed by what is bound to it; calling it again changes nothing."""
    if "forward" in vars(module):
        return
    original: Any = inspect.unwrap(type(module).forward)
    signature = inspect.signature(original)
    cache = next(name for name in _CACHES if name in signature.parameters)
    operators = {
        name: _convolution(module, operator) if name == CONVOLUTION else _operator(module, name, operator)
        for name, operator in _operators_of(original).items()
    }
    copy = _with_operators(original, operators)

    def forward(*inputs: Any, **keywords: Any) -> Any:
        arguments = signature.bind(module, *inputs, **keywords).arguments
        if arguments.pop("attention_mask", None) is not None:
            raise ModelRefused(f"{type(module).__name__} is given a mask of padding, which no step of ours has")
        more = arguments.pop("kwargs", {})
        setattr(module, _CALLS, 0)
        return copy(**{**arguments, **more, cache: _NothingKept()})

    module.forward = forward


def own_forward(module: nn.Module) -> Callable[[torch.Tensor], Any]:
    """The forward of a mixer's class by the operators that transformers has in torch.

    Where another package is installed that has one of them (flash-linear-attention, causal-conv1d, mamba-ssm), the
    class itself calls that, whatever the device.
    """
    original: Any = inspect.unwrap(type(module).forward)
    return partial(_with_operators(original, _operators_of(original)), module)


def _operators_of(forward: Any) -> dict[str, Operator]:
    """What mixes tokens in a mixer's ``forward``, by name: the functions in torch, whatever stands in for them."""
    names = {CONVOLUTION, *RECURRENCES}.intersection(forward.__code__.co_names)
    return {name: inspect.unwrap(forward.__globals__[name]) for name in names}


def _with_operators(forward: Any, operators: dict[str, Operator]) -> FunctionType:
    """A copy of ``forward`` in whose globals these names lead to ``operators``."""
    copy = FunctionType(
        forward.__code__,
        {**forward.__globals__, **operators},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


_CALLS = "castor_calls"
"""On a mixer: how many of its operators have been called in this forward."""


def bind(module: nn.Module, state: MixerState) -> None:
    """Make ``state`` compute the operators of ``module``."""
    setattr(module, _STATE, state)


@contextmanager
def bound(module: nn.Module, state: MixerState) -> Iterator[None]:
    """Within the block ``state`` computes the operators of ``module``."""
    before = _bound_to(module)
    bind(module, state)
    try:
        yield
    finally:
        bind(module, before)


def bind_all(found: Iterable[Mixer], states: RecurrentStates) -> None:
    """Bind each of the mixers of a model to its part of ``states``."""
    first = 0
    for mixer in found:
        bind(mixer.module, SlottedMixer(states, first))
        first += len(mixer.states)


def _convolution(module: nn.Module, original: Operator) -> Operator:
    signature = inspect.signature(original)

    def convolve(*inputs: Any, **keywords: Any) -> torch.Tensor:
        arguments = signature.bind(*inputs, **keywords).arguments
        x, weight = (arguments.pop(name) for name in list(signature.parameters)[:2])
        return _bound_to(module).convolve(
            _next_call(module), x, weight, arguments.get("bias"), arguments.get("activation")
        )

    return convolve


def _operator(module: nn.Module, name: str, original: Operator) -> Operator:
    recurrence, signature = RECURRENCES[name], inspect.signature(original)

    def recur(*inputs: Any, **keywords: Any) -> Any:
        arguments = signature.bind(*inputs, **keywords).arguments
        arguments.update(arguments.pop("kwargs", {}))
        out = _bound_to(module).recur(_next_call(module), recurrence, original, arguments)
        return out, out  # a mixer hands its last state to its cache, which keeps nothing

    return recur


def _bound_to(module: nn.Module) -> MixerState:
    state: MixerState = getattr(module, _STATE)
    return state


def _next_call(module: nn.Module) -> int:
    call: int = getattr(module, _CALLS)
    setattr(module, _CALLS, call + 1)
    return call


def _code_of(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward).__code__

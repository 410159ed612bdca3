"""The dry run of ``engine.model.probe`` before any weight is there: on weights that have shapes but no values.

The model is built as its configuration says, with all of its layers and sizes, on torch's meta device. What a step
computes of activations alone (positions, rotations, masks, the choice of experts) is computed on the CPU; what needs a
weight becomes a constant of the right shape. So attention, its masks and windows and the shapes of keys and values are
seen as they will be, in little memory. Whether neighbouring tokens are mixed is seen only once weights are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers.modeling_utils import local_torch_dtype

from engine.api.errors import ModelRefused
from engine.failures import refused_as
from engine.model import attention_hook
from engine.model.eligibility import described
from engine.model.latent import keep_latents
from engine.model.probe import DryRunFailed, Probe, probe
from engine.model.refusals import advised
from engine.rope.query_scale import scale_queries

LARGEST_MODEL = 10**13
"""Weights of a model that is run: its activations, which are as wide as it is, take memory."""
LARGEST_BUFFER = 1 << 24
"""Numbers of a buffer that is computed; a larger one has a shape only."""


class Rehearsed(NamedTuple):
    """A model without values, and what a dry run of it showed.

    ``undecided`` is why there is no probe: something needs values. It is decided once the weights are loaded.
    """

    model: Any
    probe: Probe | None
    undecided: str


def rehearse(config: Any, dtype: torch.dtype = torch.float32) -> Rehearsed:
    """Build the model of an eligible configuration without memory and probe it as if its weights were ``dtype``: of the
    same type are some recurrent states.

    Raises ``ModelRefused`` where it cannot be built, and as the probe does: naming the layer and the reason.
    """
    attention_hook.register()
    with local_torch_dtype(dtype):
        model: Any = described(deepcopy(config)).eval()  # what is set on the model lands in its configuration
    if (count := sum(weight.numel() for weight in model.parameters())) > LARGEST_MODEL:
        raise ModelRefused(f"the config.json of {config.model_type} describes {count} weights; no model has so many")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the fused products of experts know no shapes in float32
    with refused_as(f"{config.model_type} cannot be built as its config.json says"):
        _fill_buffers(model)
    try:
        with advised(config), _Shapes():
            scale_queries(model, proves=False)
            return Rehearsed(model, keep_latents(partial(probe, model, config.get_text_config()), proves=False), "")
    except DryRunFailed as failure:
        return Rehearsed(model, None, str(failure))


def _fill_buffers(model: Any) -> None:
    """Compute buffers, such as the frequencies of rotary embeddings: they follow from the configuration alone."""
    for module in model.modules():
        small = [name for name, buffer in module.named_buffers(recurse=False) if buffer.numel() <= LARGEST_BUFFER]
        for name in small:
            setattr(module, name, torch.zeros_like(getattr(module, name), device="cpu"))
        if small:
            model._init_weights(module)


class _Shapes(TorchDispatchMode):  # type: ignore[misc]  # torch has no type for it
    """Operators of weights without values: of weights alone they stay so, with activations they give constants."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if given.get("device") is not None and torch.device(given["device"]).type == "meta":
            given["device"] = torch.device("cpu")  # where a weight is, code puts what it computes
        tensors = [one for one in tree_flatten((args, given))[0] if isinstance(one, torch.Tensor)]
        without_values = [one for one in tensors if one.is_meta]
        if not without_values:
            return func(*args, **given)
        if len(without_values) == len(tensors):
            return func(*args, **{name: value for name, value in given.items() if name != "device"})
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                return value  # changed in place, to values that nobody knows
        return tree_map(_constant, func(*tree_map(_shape_of, args), **tree_map(_shape_of, given)))


def _shape_of(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _constant(found: Any) -> Any:
    return torch.ones_like(found, device="cpu") if isinstance(found, torch.Tensor) else found

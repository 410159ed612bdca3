"""Loads a model of transformers whose weights partly stay in blocks.

transformers makes the model and fills in what is no block; the blocks are put in before it does, by the hook that it
has for quantised models, so that their place is never allocated as floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.logging import tqdm
from transformers.utils.quantization_config import QuantizationConfigMixin

from engine.packed.experts import pack_experts
from engine.packed.modules import MakeProduct, Stored, is_packed, pack

_METHOD = "castor_blocks"


_ONE_AT_A_TIME = Lock()
"""transformers reads in several threads, each of which would hold a weight twice."""


class Lazy:
    """A weight that is unpacked when transformers asks for it, in the type that it wants by then."""

    def __init__(self, stored: Stored, dtype: torch.dtype) -> None:
        self._stored = stored
        self.dtype = dtype

    def __getitem__(self, _all: object) -> torch.Tensor:
        with _ONE_AT_A_TIME:
            return self._stored.numbers(self.dtype)


@register_quantization_config(_METHOD)
class _Config(QuantizationConfigMixin):  # type: ignore[misc]  # transformers' decorators have no types
    def __init__(self, weights: Mapping[str, Stored], dtype: torch.dtype, make: MakeProduct | None) -> None:
        self.quant_method = _METHOD
        self.weights, self.dtype, self.make = weights, dtype, make
        self.packed: set[str] = set()
        self.untied: dict[str, Stored] = {}

    def __deepcopy__(self, _known: object) -> _Config:
        return self  # it goes along with the model's configuration, which is copied

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": _METHOD}


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):  # type: ignore[misc]
    def __init__(self, quantization_config: _Config, **keywords: Any) -> None:
        super().__init__(quantization_config, **keywords)
        self.pre_quantized = True

    def _process_model_before_weight_loading(self, model: nn.Module, **_keywords: Any) -> None:
        told = self.quantization_config
        if told.make is not None:
            with torch.device("cpu"):  # a model is built without memory
                told.packed = _put_blocks(model, told.weights, told.dtype, told.make)
            tied = model.all_tied_weights_keys
            for name in [name for name, source in tied.items() if source in told.packed]:
                told.untied[name] = told.weights[tied.pop(name)]  # what shares blocks and cannot have them, has numbers

    def update_weight_conversions(self, _conversions: Any, _model: nn.Module) -> list[Any]:
        return []  # the names are the model's own already

    def get_new_dtype(self, _converter: Any, lazy: Lazy, dtype: torch.dtype | None) -> torch.dtype | None:
        lazy.dtype = dtype or lazy.dtype  # some weights stay in float32 whatever the model's type is
        return dtype

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def load_stored(
    model_class: Any,
    config: Any,
    weights: Mapping[str, Stored],
    dtype: torch.dtype,
    make: MakeProduct | None,
    **keywords: Any,
) -> tuple[Any, dict[str, Any]]:
    """The model with these weights, and transformers' report.

    What ``make`` finds products for stays in blocks; all else becomes numbers of the type ``dtype``.
    """
    told = _Config(weights, dtype, make)
    module, report = model_class.from_pretrained(
        None,
        config=config,
        state_dict=_Absent(weights, dtype, told),
        quantization_config=told,
        dtype=dtype,
        output_loading_info=True,
        **keywords,
    )
    for part in module.modules():
        if is_packed(part):
            part.is_loading = False
    module.hf_quantizer = None
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    return module, report


class _Absent(dict[str, Lazy]):
    """The weights that are no blocks of the model: known only once the blocks are in their places."""

    def __init__(self, weights: Mapping[str, Stored], dtype: torch.dtype, told: _Config) -> None:
        super().__init__({name: Lazy(stored, dtype) for name, stored in weights.items()})
        self._told = told

    def items(self) -> Any:
        told = self._told
        untied = [(name, Lazy(stored, told.dtype)) for name, stored in told.untied.items()]
        return [*((name, lazy) for name, lazy in super().items() if name not in told.packed), *untied]


def _put_blocks(model: Any, weights: Mapping[str, Stored], dtype: torch.dtype, make: MakeProduct) -> set[str]:
    """Put blocks in the place of weights; returns the names of those that are. Tied weights share theirs."""
    tied = model.all_tied_weights_keys  # the name of each, and of the one that a checkpoint has
    packed: set[str] = set()
    for name, module in tqdm(list(model.named_modules()), desc="packing weights"):
        for own, _ in list(module.named_parameters(recurse=False)):
            full = f"{name}.{own}" if name else own
            stored = weights.get(full) or weights.get(tied.get(full, ""))
            if stored is None:
                continue
            if pack(module, own, stored, dtype, make, full) or pack_experts(module, own, stored, make, full):
                packed.add(full)
                tied.pop(full, None)
    return packed

"""Checks by configuration and files whether a model can be served, before any weight is loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, PreTrainedModel

from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.failures import refused_as, sentence
from engine.model.architecture import STATE_LAYERS, SUPPORTED_LAYERS
from engine.model.config_file import quantisation_of, read_config
from engine.quantised import method_of
from engine.quantised.method import Method
from engine.rope.long_rope import takes_long_factors
from engine.weights.usable import GGUF_LINK

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""What transformers calls the interface in the modules of models that use it."""


def config_of(folder: Path) -> Any:
    """The configuration of a prepared folder. Raises ``ModelRefused`` for a folder that is not one."""
    if not (folder / "config.json").is_file():
        raise ModelRefused(f"{folder} holds no config.json; it is not a prepared model folder")
    if not (folder / GGUF_LINK).is_file() and not any(folder.glob("*.safetensors")):
        raise ModelRefused(f"{folder} holds no *.safetensors file; no other format of weights is loaded")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ModelRefused(f"{index} is not a weight index: {sentence(error)}") from error
        # transformers would read whatever the index names, including pickles in any folder.
        wrong = sorted(name for name in named if Path(name).name != name or not name.endswith(".safetensors"))
        if wrong:
            raise ModelRefused(f"{index} names {wrong[0]!r}; only *.safetensors beside it are read")
    config = read_config(folder)
    # Where a checkpoint holds the text part of a composite alone, what describes the towers describes nothing.
    model_class = served_class(config)
    if isinstance(config, model_class.config_class):
        return config
    text = config.get_text_config()
    if (settings := quantisation_of(config)) is not None:  # of the whole file
        text.quantization_config = settings
    return text


def served_class(config: Any) -> Any:
    """The class that loads a checkpoint: the one that it names, or else the one with its towers.

    The names of weights are those of that class, so a composite is loaded whole although only its text is computed.
    Raises ``ModelRefused`` for a model that does not continue text, or not with a decoder alone.
    """
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        raise ModelRefused(f"{config.model_type} is an encoder-decoder; only decoder models are served")
    kinds = (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM)
    found: list[Any] = [kind._model_mapping[type(config)] for kind in kinds if type(config) in kind._model_mapping]
    if not found:
        raise ModelRefused(f"{config.model_type} is not a causal language model: it does not continue text")
    named = [model_class for model_class in found if model_class.__name__ in (config.architectures or ())]
    return (named or found)[0]


def method_of_model(config: Any) -> Method | None:
    """How the weights of a model are quantised; None if they are not. Raises ``ModelRefused``."""
    settings = quantisation_of(config)
    return None if settings is None else method_of(settings)


def require_eligible(config: Any) -> None:
    """Raises ``ModelRefused`` for a model whose configuration says that a paged decoder cannot serve it."""
    text = config.get_text_config()
    method_of_model(config)
    model_class = served_class(config)
    kinds = getattr(text, "layer_types", None) or ()
    for index, kind in enumerate(kinds):
        if kind not in SUPPORTED_LAYERS:
            raise ModelRefused(
                f"layer {index} of {config.model_type} is of the type {kind!r}; only {sorted(SUPPORTED_LAYERS)} can be "
                "served"
            )
    if model_class.is_backend_compatible():
        return
    decoder = _without_memory(model_class, config).get_decoder()  # of a composite the part that reads text
    declared = isinstance(decoder, PreTrainedModel) and decoder.is_backend_compatible()
    # Classes with recurrent layers never declare it, although their attention uses the interface.
    is_recurrent = not STATE_LAYERS.isdisjoint(kinds) and hasattr(sys.modules[type(decoder).__module__], _INTERFACE)
    if not declared and not is_recurrent:
        raise ModelRefused(
            f"layer 0 of {config.model_type} ({_first_layer(decoder)}) does not send its attention through "
            "transformers' attention interface, so its cache cannot be paged"
        )


def _first_layer(decoder: nn.Module) -> str:
    """The class of the first decoder layer and of its parts."""
    layers = next((m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m)), None)
    if layers is None:
        return type(decoder).__name__
    parts = {type(part).__name__ for part in layers[0].children()}
    return f"{type(layers[0]).__name__}: {', '.join(sorted(parts))}"


def _without_memory(model_class: Any, config: Any) -> Any:
    """The model that a configuration describes, with weights that have shapes but no values."""
    with refused_as(f"{config.model_type} cannot be built as its config.json says"), torch.device("meta"):
        return model_class(config)


def described(config: Any) -> nn.Module:
    """The model of an eligible configuration on the meta device: all of its weights, without memory."""
    return _without_memory(served_class(config), config)


def require_weights(folder: Path, config: Any) -> int:
    """The number of weights. Refuses more than the files hold: transformers would allocate the missing ones."""
    count: int = sum(weight.numel() for weight in described(config).parameters())
    held = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if (folder / GGUF_LINK).is_file():  # its tensors were compared when it was prepared
        return count
    if count > most_weights(config, held):
        raise ModelRefused(
            f"the config.json in {folder} describes {count} weights, but its *.safetensors have {held} bytes; "
            "they do not belong to the same model"
        )
    return count


def most_weights(config: Any, held: int) -> int:
    """How many weights files of ``held`` bytes hold at most: none takes less than a byte, quantised ones two bits."""
    return held if quantisation_of(config) is None else 4 * held


def longest_context(config: EngineConfig, model_config: Any) -> tuple[int, str]:
    """The context in tokens, and what shortened it, if anything did. Raises ``ModelRefused``."""
    text = model_config.get_text_config()
    limit: int | None = getattr(text, "max_position_embeddings", config.max_context)
    if limit is None:
        raise ModelRefused(
            f"{text.model_type} names no max_position_embeddings; set max_context to the tokens that it was trained on"
        )
    reason = ""
    original = _original_context(text, lambda rope: rope.get("rope_type") == "dynamic" and not rope.get("alpha"))
    if original is not None and original <= limit:
        limit = original
        reason = f"its rotary embedding is dynamic: beyond {original} tokens every further one changes it for all"
    if config.max_context is None:
        return limit, reason
    if not 1 <= config.max_context <= limit:
        because = f", because {reason}" if reason else ""
        raise ModelRefused(
            f"max_context is {config.max_context}, but {text.model_type} allows 1 to {limit} tokens{because}"
        )
    return config.max_context, reason if config.max_context == limit else ""


def original_context(model_config: Any) -> int | None:
    """The tokens beyond which a text is rotated otherwise, all of it and once (LongRoPE); None if no text is."""
    return _original_context(model_config.get_text_config(), takes_long_factors)


def _original_context(text: Any, is_meant: Callable[[dict[str, Any]], bool]) -> int | None:
    """The shortest original context of the rotary embeddings that are meant; None if none is."""
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    limits = [
        rope.get("original_max_position_embeddings") or text.max_position_embeddings
        for rope in (nested or [parameters])
        if is_meant(rope)
    ]
    return min(limits, default=None)

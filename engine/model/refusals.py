"""What to say of models that cannot be served: their class or the format of their weights, and what would work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.api.errors import ModelRefused
from engine.model.probe import DryRunFailed

_SERVED = (
    "decoders with full or sliding attention, gated delta nets, Mamba-2 or short convolutions are served, such as "
    "Llama, Qwen 3.5, Gemma 4 and Mistral"
)

# Of methods that a model is published with by its makers, in the words of its files.
_DETAILS = ("fmt", "format", "quant_algo", "weight_format")


@contextmanager
def advised(config: Any) -> Iterator[None]:
    """Have refusals of a model for how it is built name its class, and what is served instead.

    An error of the model's own code is passed on: it says nothing of how the model is built.
    """
    try:
        yield
    except DryRunFailed:
        raise
    except ModelRefused as refusal:
        said, known = str(refusal), [config.model_type, *(getattr(config, "architectures", None) or ())]
        if not any(name in said for name in known):
            said = f"{known[-1]}: {said}"
        raise ModelRefused(said if "served" in said or ";" in said else f"{said}; {_SERVED}") from refusal


def quantised(config: Any) -> str:
    """The refusal of a model with a ``quantization_config``."""
    settings = config.quantization_config
    found: dict[str, Any] = settings if isinstance(settings, dict) else settings.to_dict()
    method = str(found.get("quant_method") or _by_bits(found) or "a method that it does not name")
    details = [str(found[key]) for key in _DETAILS if isinstance(found.get(key), str) and found[key] != method]
    if isinstance(bits := found.get("bits"), int):
        details.append(f"{bits} bits")
    shown = f"{method} ({', '.join(details)})" if details else method
    return (
        f"{config.model_type} has quantised weights (quantization_config: {shown}), which are not loaded; "
        "take the repository of the same model in bfloat16, or a GGUF file of it"
    )


def _by_bits(found: dict[str, Any]) -> str:
    """bitsandbytes' settings of earlier versions name no method."""
    return next(("bitsandbytes" for key in ("load_in_4bit", "load_in_8bit") if found.get(key)), "")

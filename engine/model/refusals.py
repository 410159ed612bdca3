"""What to say of models that cannot be served: their class, and what would work."""

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

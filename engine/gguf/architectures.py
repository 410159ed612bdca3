"""The architectures of GGUF files: what configuration of transformers each one means, and where its tensors belong.

The keys are llama.cpp's (gguf-py, ``constants.py``), what its converter does to weights is undone here (llama.cpp,
``conversion/*.py``). To add an architecture: a function that makes the configuration of ``Fields``, one that names the
changes of the tensors, and a row in the table of its module. What the header does not say is the published value of the
models of that architecture.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from engine.gguf.dense import DENSE, Architecture
from engine.gguf.fields import Fields
from engine.gguf.header import Header, Unreadable
from engine.gguf.hybrids import HYBRIDS
from engine.gguf.mixtures import MIXTURES

ARCHITECTURES = {**DENSE, **MIXTURES, **HYBRIDS}


def config_of(header: Header) -> Any:
    """The configuration of the model in a file. Raises ``Unreadable``."""
    found = _architecture(header)
    described = found.describe(Fields(header))
    return AutoConfig.for_model(described.pop("model_type", found.model_type), **described)


def changes_of(header: Header, config: Any) -> list[Any]:
    """What is done to the tensors of a file, as ``engine.gguf.weights`` takes it."""
    return _architecture(header).changes(config)


def _architecture(header: Header) -> Architecture:
    if header.architecture not in ARCHITECTURES:
        raise Unreadable(
            f"its architecture {header.architecture!r} is not read; known are {', '.join(sorted(ARCHITECTURES))}. Use "
            "the model's safetensors folder"
        )
    return ARCHITECTURES[header.architecture]

"""How many bytes of weights a decoded token needs to read."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path

from engine.weights.usable import GGUF_LINK

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}


def bytes_per_token(weights: Path) -> int:
    """All tensors of a model folder except a separate input embedding, of which a token reads one row; a file in full.

    Where input and output share the embedding it is read as a whole, and a GGUF file of such a model too.
    """
    file = weights / GGUF_LINK if weights.is_dir() and (weights / GGUF_LINK).exists() else weights
    if file.is_file():
        return file.stat().st_size
    sizes: dict[str, int] = {}
    for path in sorted(weights.glob("*.safetensors")):
        sizes |= _tensor_bytes(path)
    has_own_head = any(name.endswith("lm_head.weight") for name in sizes)
    return sum(size for name, size in sizes.items() if not (has_own_head and name.endswith("embed_tokens.weight")))


def _tensor_bytes(path: Path) -> dict[str, int]:
    """The size of each tensor, from the file's header: its length in 8 bytes, then JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: prod(entry["shape"]) * _BYTES[entry["dtype"]] for name, entry in header.items()}

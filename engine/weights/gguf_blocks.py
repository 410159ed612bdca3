"""Quantised blocks of a GGUF file, kept beside the float32 weights that they represent.

A block is copied only where unpacking it gives exactly the weight that transformers made, so computing with blocks is
computing with the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engine.weights.sources import BLOCKS_FILE

KINDS = ("Q4_0", "Q4_1", "Q8_0")


def write_blocks(reader: Any, model: Any, target: Path) -> None:
    """Write the blocks of all two-dimensional weights of ``model`` that ``reader``, a GGUF reader, has in blocks."""
    import gguf  # only to write: reading blocks needs torch alone

    tensors = {tensor.name: tensor for tensor in reader.tensors if tensor.tensor_type.name in KINDS}
    blocks, kinds = {}, {}
    config = model.config.get_text_config()
    architecture = next((a for a, known in gguf.MODEL_ARCH_NAMES.items() if known == config.model_type), None)
    names = gguf.get_tensor_name_map(architecture or gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.named_parameters():
        tensor = tensors.get(f"{names.get_name(name.removesuffix('.weight'))}.weight")
        if weight.dim() == 2 and tensor is not None:
            rows = _rows(weight.detach().numpy(), tensor, config)
            if rows is not None:
                data = tensor.data[rows].reshape(*weight.shape[:1], weight.shape[1] // 32, -1)
                blocks[name] = torch.from_numpy(np.ascontiguousarray(data))
                kinds[name] = tensor.tensor_type.name
    if blocks:
        save_file(blocks, target / BLOCKS_FILE, metadata=kinds)


def read_blocks(folder: Path) -> dict[str, tuple[torch.Tensor, str]]:
    """The blocks, bytes [channels, groups, bytes of a block], and their type, by the name of the weight; {} without."""
    path = folder / BLOCKS_FILE
    if not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        return {name: (file.get_tensor(name), kind) for name, kind in file.metadata().items()}


def _rows(weight: np.ndarray, tensor: Any, config: Any) -> np.ndarray | None:
    """The order of the tensor's rows that gives the weight; None if no known order does."""
    import gguf

    unpacked = gguf.dequantize(tensor.data, tensor.tensor_type)
    if unpacked.shape != weight.shape:
        return None
    orders = _orders(len(weight), config)
    return next((order for order in orders if np.array_equal(unpacked[order], weight)), None)


def _orders(rows: int, config: Any) -> Iterator[np.ndarray]:
    """The rows as they are; or, for queries and keys, with the two halves of each head interleaved, as llama.cpp stores
    them for its rotary embedding (convert_hf_to_gguf.py, ``permute``)."""
    yield np.arange(rows)
    for heads in (config.num_attention_heads, config.num_key_value_heads):
        if rows % (2 * heads) == 0:
            yield np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

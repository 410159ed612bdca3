"""The weights of a prepared folder that links to a GGUF file: what they take in memory, and how they are loaded."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from engine.api.engine import EngineConfig
from engine.gguf.architectures import changes_of
from engine.gguf.header import Header, read_header
from engine.gguf.weights import stored_weights
from engine.model.weight_files import too_large
from engine.native.errors import NotNative
from engine.native.library import load_library
from engine.native.products import Products, knows
from engine.packed.loading import load_stored
from engine.packed.modules import MakeProduct
from engine.packed.panel_file import PanelFile
from engine.packed.schemes import SCHEMES
from engine.packed_triton import planes
from engine.weights.usable import GGUF_LINK

_log = logging.getLogger(__name__)


def header_of(folder: Path) -> Header | None:
    """The header of the file that a folder links to; None for a folder of safetensors. Raises ``ModelRefused``."""
    link = folder / GGUF_LINK
    return read_header(link.resolve()) if link.is_file() else None


def stay_in_blocks(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether blocks are computed with, or unpacked at the load."""
    if device.type == "cpu":
        return config.native and dtype == torch.float32
    return dtype in (torch.bfloat16, torch.float16) and find_spec("triton") is not None


def bytes_in_blocks(header: Header, device: torch.device, dtype: torch.dtype) -> int:
    """What the weights of a file take on a device where blocks stay, and the rest is of the type ``dtype``."""
    known = knows if device.type == "cpu" else planes.knows
    total = 0
    for tensor in header.tensors.values():
        scheme = SCHEMES.get(tensor.kind)
        if scheme is not None and known(scheme, tensor.shape):
            total += tensor.elements // scheme.columns * scheme.block_bytes
        else:
            total += dtype.itemsize * tensor.elements
    return total


def kinds_of(header: Header) -> str:
    """The schemes of a file's matrices, in words."""
    found = {SCHEMES[tensor.kind].name for tensor in header.tensors.values() if tensor.kind in SCHEMES}
    return f"blocks of {', '.join(sorted(found))}" if found else "float32"


def room_problem(
    header: Header,
    what: str,
    num_weights: int,
    config: EngineConfig,
    loaded: torch.dtype,
    device: torch.device,
    room: int,
) -> str | None:
    """Why weights, named by ``what``, do not fit into ``room`` bytes of the device; None if they do."""
    in_blocks = stay_in_blocks(config, device, loaded)
    wanted = bytes_in_blocks(header, device, loaded) if in_blocks else num_weights * loaded.itemsize
    kind = "blocks" if in_blocks else str(loaded).removeprefix("torch.")
    return None if wanted <= room else too_large(what, wanted, kind, device)


def load_gguf(
    header: Header, model_class: Any, model_config: Any, config: EngineConfig, device: torch.device, **keywords: Any
) -> tuple[Any, dict[str, Any], PanelFile | None]:
    """The model of a file, transformers' report, and what keeps the panels of its matrices."""
    dtype, make, panels = keywords.pop("dtype"), None, None
    if stay_in_blocks(config, device, dtype):
        if device.type == "cpu" and config.cache_dir is not None:
            files = sorted({tensor.path for tensor in header.tensors.values()})
            panels = PanelFile(Path(config.cache_dir) / "panels", files)
        make = _products(config, device, dtype, panels)
    weights = stored_weights(header, changes_of(header, model_config))
    return *load_stored(model_class, model_config, weights, dtype, make, **keywords), panels


def _products(
    config: EngineConfig, device: torch.device, dtype: torch.dtype, kept: PanelFile | None
) -> MakeProduct | None:
    if device.type != "cpu":
        from engine.packed_triton.matrices import Matrices  # late: it imports Triton

        return Matrices(device, dtype)
    try:
        code = load_library(None if config.cache_dir is None else Path(config.cache_dir) / "native")
        return Products(code, torch.get_num_threads(), kept).product_of
    except (NotNative, MemoryError) as reason:
        _log.warning("Weights in blocks are unpacked to float32, which takes more memory and is slower: %s", reason)
        return None

"""The weights of a prepared folder that may stay in blocks: what they take in memory, and how they are loaded.

They are those of a GGUF file that the folder links to, or quantised safetensors, or safetensors that ``quantize`` packs
at the load. Others are transformers' to load.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from engine.api.engine import QUANTIZE, EngineConfig
from engine.api.errors import ModelRefused
from engine.failures import refused_as
from engine.gguf.architectures import changes_of
from engine.gguf.header import Header, read_header
from engine.gguf.weights import stored_weights
from engine.model.eligibility import described, method_of_model
from engine.model.weight_files import too_large
from engine.native.errors import NotNative
from engine.native.library import load_library
from engine.native.products import Products
from engine.packed.checkpoint import weights_of
from engine.packed.loading import load_stored
from engine.packed.modules import MakeProduct, Stored
from engine.packed.panel_file import PanelFile
from engine.packed.places import CPU, Target, bytes_in, kept_in
from engine.packed.schemes import SCHEMES, Scheme
from engine.quantised.method import Method
from engine.weights.usable import GGUF_LINK

_log = logging.getLogger(__name__)


class Measured(Protocol):
    """What weights take that may stay in blocks."""

    def bytes_in_blocks(self, target: Target = CPU) -> int:
        """What they take in memory where blocks stay."""

    def kinds(self, target: Target = CPU) -> str:
        """The schemes of their blocks, in words."""


class Held(Measured, Protocol):
    """Weights that are here and may stay in blocks."""

    def stored(self) -> Mapping[str, Stored]:
        """The weights, by the names of the model."""

    def files(self) -> list[Path]:
        """The files that they are read from."""


class GgufFile:
    """Those of a GGUF file."""

    def __init__(self, header: Header, model_config: Any) -> None:
        self._header, self._config = header, model_config

    def bytes_in_blocks(self, target: Target = CPU) -> int:
        total = 0
        for tensor in self._header.tensors.values():
            scheme = SCHEMES.get(tensor.kind)
            is_known = scheme is not None and target.multiplies_by(scheme, tensor.shape)
            total += bytes_in(tensor.shape, scheme if is_known else None, target)
        return total

    def kinds(self, _target: Target = CPU) -> str:
        return _in_words(SCHEMES.get(tensor.kind) for tensor in self._header.tensors.values())

    def stored(self) -> Mapping[str, Stored]:
        return stored_weights(self._header, changes_of(self._header, self._config))

    def files(self) -> list[Path]:
        return sorted({tensor.path for tensor in self._header.tensors.values()})


class Checkpoint:
    """Those of quantised safetensors, or of others that are quantised as ``choice`` says."""

    def __init__(self, folder: Path, model_config: Any, choice: str) -> None:
        self._folder, self._model = folder, described(model_config)
        self._weights = weights_of(folder, self._model, method_of_model(model_config), choice)

    def bytes_in_blocks(self, target: Target = CPU) -> int:
        return sum(bytes_in(shape, scheme, target) for shape, scheme in self._kept(target))

    def kinds(self, target: Target = CPU) -> str:
        return _in_words(scheme for _, scheme in self._kept(target))

    def stored(self) -> Mapping[str, Stored]:
        return self._weights

    def files(self) -> list[Path]:
        return sorted(self._folder.glob("*.safetensors"))

    def _kept(self, target: Target) -> list[tuple[torch.Size, Scheme | None]]:
        known = self._weights
        return kept_in(self._model, lambda place: known[place.name].scheme() if place.name in known else None, target)


class Unfetched:
    """Quantised safetensors that are not here: what their files take on a disk."""

    def __init__(self, size: int, method: Method) -> None:
        self._size, self._method = size, method

    def bytes_in_blocks(self, _target: Target = CPU) -> int:
        return self._size

    def kinds(self, _target: Target = CPU) -> str:
        return self._method.name


class Planned:
    """What ``choice`` would make of the weights of a model, which needs no memory."""

    def __init__(self, model: Any, choice: str) -> None:
        self._model, self._choice = model, choice

    def bytes_in_blocks(self, target: Target = CPU) -> int:
        return sum(bytes_in(shape, scheme, target) for shape, scheme in self._kept(target))

    def kinds(self, target: Target = CPU) -> str:
        return _in_words(scheme for _, scheme in self._kept(target))

    def _kept(self, target: Target) -> list[tuple[torch.Size, Scheme | None]]:
        return kept_in(self._model, lambda place: place.scheme(self._choice), target)


def header_of(folder: Path) -> Header | None:
    """The header of the file that a folder links to; None for a folder of safetensors. Raises ``ModelRefused``."""
    link = folder / GGUF_LINK
    return read_header(link.resolve()) if link.is_file() else None


def held_of(header: Header | None, model_config: Any, config: EngineConfig) -> Held | None:
    """The weights of the folder ``config.path`` that may stay in blocks; None where transformers loads them."""
    if header is not None:
        return GgufFile(header, model_config)
    if config.quantize == "none" and method_of_model(model_config) is None:
        return None
    with refused_as(f"the weights in {config.path} cannot be loaded"):
        return Checkpoint(Path(config.path), model_config, config.quantize)


def require_quantizable(
    config: EngineConfig, header: Header | None, model_config: Any, device: torch.device, dtype: torch.dtype
) -> None:
    """Raises ``ModelRefused`` where ``config.quantize`` asks for what cannot be done, and says what can."""
    if config.quantize == "none":
        return
    asked = f"quantize is {config.quantize!r}, but"
    if header is not None:
        raise ModelRefused(f"{asked} the weights of a GGUF file are quantised already; leave quantize out")
    if (method := method_of_model(model_config)) is not None:
        raise ModelRefused(f"{asked} the weights are quantised already ({method.name}); leave quantize out")
    if not stay_in_blocks(config, device, dtype):
        raise ModelRefused(
            f"{asked} only the C code computes with blocks, in float32; leave dtype and native out"
            if device.type == "cpu"
            else f"{asked} a GPU computes with blocks in bfloat16 or float16, by Triton; leave quantize and dtype out"
        )


def bytes_of_choices(model: Any, target: Target) -> dict[str, int]:
    """What the weights of a model take, by each choice of ``quantize``. ``model`` needs no memory."""
    return {choice: Planned(model, choice).bytes_in_blocks(target) for choice in QUANTIZE}


def stay_in_blocks(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether blocks are computed with, or unpacked at the load."""
    if device.type == "cpu":
        return config.native and dtype == torch.float32
    return dtype in (torch.bfloat16, torch.float16) and find_spec("triton") is not None


def room_problem(
    held: Measured,
    what: str,
    num_weights: int,
    config: EngineConfig,
    loaded: torch.dtype,
    device: torch.device,
    room: int,
) -> str | None:
    """Why weights, named by ``what``, do not fit into ``room`` bytes of the device; None if they do."""
    in_blocks = stay_in_blocks(config, device, loaded)
    wanted = held.bytes_in_blocks(Target(device, loaded)) if in_blocks else num_weights * loaded.itemsize
    kind = "blocks" if in_blocks else str(loaded).removeprefix("torch.")
    return None if wanted <= room else too_large(what, wanted, kind, device)


def load_held(
    held: Held, model_class: Any, model_config: Any, config: EngineConfig, device: torch.device, **keywords: Any
) -> tuple[Any, dict[str, Any], PanelFile | None]:
    """The model with these weights, transformers' report, and what keeps the panels of its matrices.

    Raises ``ModelRefused`` where ``quantize`` cannot be.
    """
    dtype, make, panels = keywords.pop("dtype"), None, None
    if stay_in_blocks(config, device, dtype):
        if device.type == "cpu" and config.cache_dir is not None:
            panels = PanelFile(Path(config.cache_dir) / "panels", held.files(), config.quantize)
        make = _products(config, device, dtype, panels)
    plain = _without_quantisation(model_config)
    return *load_stored(model_class, plain, held.stored(), dtype, make, **keywords), panels


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
        if config.quantize != "none":
            raise ModelRefused(f"quantize is {config.quantize!r}, but nothing computes with blocks: {reason}") from None
        _log.warning("Weights in blocks are unpacked to float32, which takes more memory and is slower: %s", reason)
        return None


def _without_quantisation(model_config: Any) -> Any:
    """The configuration for transformers, which would read quantised weights in its own way."""
    plain = deepcopy(model_config)
    for part in (plain, plain.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return plain


def _in_words(schemes: Iterable[Scheme | None]) -> str:
    names = sorted({scheme.name for scheme in schemes if scheme is not None})
    return f"blocks of {', '.join(names)}" if names else "float32"

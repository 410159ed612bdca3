"""From a prepared folder to a model whose attention can be paged, or the reason why not.

What can be read from the configuration is refused before any weight is loaded; the dry run of
``engine.attention.probe`` decides the rest.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from engine.allocator import take_first_memory
from engine.attention import seam
from engine.attention.probe import Probe, probe
from engine.config_file import read_config
from engine.failures import NOT_FAILURES, sentence
from engine.types import EngineConfig, ModelRefused

Progress = Callable[[str, float], None]
SUPPORTED_LAYERS = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its device, in evaluation mode, switched to the paged attention but not bound to a backend yet.

    ``max_context`` is what the model's positions allow, in tokens; ``limit`` says in words what shortened it, if
    anything did.
    """

    module: Any
    probe: Probe
    max_context: int
    limit: str
    config_eos_ids: tuple[int, ...]


def load_model(config: EngineConfig, progress: Progress) -> LoadedModel:
    """Load the folder ``config.path``. Raises ``ModelRefused`` naming the layer and the reason.

    ``dtype`` "auto" is the checkpoint's own on a GPU and float32 on a CPU, where half precision is slower; ``device``
    "auto" is the first GPU, else the CPU.
    """
    _silence_transformers()
    seam.register()
    folder = Path(config.path)
    model_config = _config_of(folder)
    _require_eligible(model_config)
    _require_weights(folder, model_config)
    max_context, limit = _max_context(config, model_config)
    device = resolve_device(config.device)
    take_first_memory(device)
    module = _load_weights(folder, model_config, _dtype(config.dtype, device), device, progress)
    probed = probe(module, model_config.get_text_config().num_hidden_layers)
    return LoadedModel(module, probed, max_context, limit, _eos_ids(module))


def resolve_device(name: str) -> torch.device:
    """The device that ``name`` means. Raises ``ModelRefused`` for one that this machine does not have."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelRefused(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelRefused(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelRefused(f"device {name!r} is not here: this torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _silence_transformers() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")


def _config_of(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ModelRefused(f"{folder} holds no config.json; it is not a prepared model folder")
    if not any(folder.glob("*.safetensors")):
        raise ModelRefused(f"{folder} holds no *.safetensors file; no other format of weights is loaded")
    _require_safetensors(folder / "model.safetensors.index.json")
    return read_config(folder)


def _require_safetensors(index: Path) -> None:
    """Refuse an index that leads elsewhere: transformers would read what it names, pickles of any folder too."""
    if not index.is_file():
        return
    try:
        named = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelRefused(f"{index} is no index of weights: {sentence(error)}") from error
    wrong = sorted(name for name in named if Path(name).name != name or not name.endswith(".safetensors"))
    if wrong:
        raise ModelRefused(f"{index} names {wrong[0]!r}; only *.safetensors beside it are read")


# --- Eligibility by configuration ----------------------------------------------------------------


def _require_eligible(config: Any) -> None:
    text = config.get_text_config()
    if config.is_encoder_decoder or text.is_encoder_decoder:
        raise ModelRefused(f"{config.model_type} is an encoder-decoder; only decoder models are served")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelRefused(f"{config.model_type} has quantised weights (quantization_config), which are not supported")
    model_class = _model_class(config)
    for index, kind in enumerate(getattr(text, "layer_types", None) or ()):
        if kind not in SUPPORTED_LAYERS:
            raise ModelRefused(
                f"layer {index} of {config.model_type} is of the type {kind!r}; only {sorted(SUPPORTED_LAYERS)} can be "
                "served from a paged cache"
            )
    if not model_class.is_backend_compatible():
        raise ModelRefused(
            f"layer 0 of {config.model_type} ({_first_layer(model_class, config)}) does not send its attention through "
            "transformers' attention interface, so its cache cannot be paged"
        )


def _model_class(config: Any) -> Any:
    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError as error:
        raise ModelRefused(f"{config.model_type} is no causal language model: it does not continue text") from error


def _first_layer(model_class: Any, config: Any) -> str:
    """The class of the first decoder layer and of its parts."""
    model = _without_memory(model_class, config)
    layers = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)), None)
    if layers is None:
        return type(model).__name__
    parts = {type(part).__name__ for part in layers[0].children()}
    return f"{type(layers[0]).__name__}: {', '.join(sorted(parts))}"


def _without_memory(model_class: Any, config: Any) -> nn.Module:
    """The model that a configuration describes, with weights that have shapes and no values."""
    try:
        with torch.device("meta"):
            model: nn.Module = model_class(config)
    except NOT_FAILURES:
        raise
    except BaseException as error:
        raise ModelRefused(f"{config.model_type} cannot be built as its config.json says: {sentence(error)}") from error
    return model


def _require_weights(folder: Path, config: Any) -> None:
    """Refuse a configuration beyond the weights that are there: transformers would make up what is missing, in memory.

    No weight takes less than a byte, since quantised ones are refused.
    """
    described = sum(weight.numel() for weight in _without_memory(_model_class(config), config).parameters())
    held = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if described > held:
        raise ModelRefused(
            f"the config.json in {folder} describes {described} weights, but its *.safetensors have {held} bytes; "
            "they are not of one model"
        )


def _max_context(config: EngineConfig, model_config: Any) -> tuple[int, str]:
    text = model_config.get_text_config()
    limit: int = text.max_position_embeddings
    reason = ""
    original = _position_limit_of_stretched_rope(text)
    if original is not None and original < limit:
        limit, reason = original, f"its rotary embedding changes beyond {original} tokens, for all sequences of a step"
    if config.max_context is None:
        return limit, reason
    if not 1 <= config.max_context <= limit:
        raise ModelRefused(f"max_context is {config.max_context}, but {text.model_type} allows 1 to {limit} tokens")
    return config.max_context, ""


def _position_limit_of_stretched_rope(text: Any) -> int | None:
    """Where the longest sequence of a call would switch the frequencies of all, so that one changes the others."""
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    limits = [
        rope.get("original_max_position_embeddings") or text.max_position_embeddings
        for rope in (nested or [parameters])
        if rope.get("rope_type") in ("longrope", "dynamic")
    ]
    return min(limits, default=None)


# --- Weights -------------------------------------------------------------------------------------


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelRefused(f"dtype {name!r} is not supported; use auto, float32, bfloat16 or float16")
    return dtype


def _load_weights(
    folder: Path, config: Any, dtype: torch.dtype | str, device: torch.device, progress: Progress
) -> nn.Module:
    with _reported(progress):
        try:
            module, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                device_map={"": device},
                attn_implementation="eager",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        except NOT_FAILURES:
            raise
        except BaseException as error:
            raise ModelRefused(f"the weights in {folder} cannot be loaded: {sentence(error)}") from error
    absent = sorted(report["missing_keys"])
    if absent:
        raise ModelRefused(f"{folder} lacks {len(absent)} weights of {config.model_type}, among them {absent[0]}")
    model: nn.Module = module.eval()
    return model


@contextmanager
def _reported(progress: Progress) -> Iterator[None]:
    """Turn transformers' progress bars into calls of ``progress`` and show none."""

    def hook(_factory: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> _Steps:
        return _Steps(args[0] if args else (), keywords.get("desc", ""), progress)

    progress("loading weights", 0.0)
    previous = transformers_logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)
    progress("loading weights", 1.0)


class _Steps:
    """Stands in for a progress bar over ``items``."""

    def __init__(self, items: Any, stage: str, progress: Progress) -> None:
        self._items = items
        self._stage = stage.lower()
        self._progress = progress

    def __iter__(self) -> Iterator[Any]:
        total = max(1, len(self._items))
        told = 0
        for done, item in enumerate(self._items):
            if done * 100 // total > told:
                told = done * 100 // total
                self._progress(self._stage, done / total)
            yield item

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_args, **_keywords: None


def _eos_ids(module: Any) -> tuple[int, ...]:
    """End tokens by the generation settings and by the configuration, each an id, a list of ids or absent."""
    found: set[int] = set()
    for source in (module.generation_config, module.config, module.config.get_text_config()):
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return tuple(sorted(found))

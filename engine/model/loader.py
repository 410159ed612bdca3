"""From a prepared folder to a model whose attention can be paged, or the reason why not.

What can be read from the configuration is refused before any weight is loaded (``engine.model.eligibility``); the dry
run of ``engine.model.probe`` decides the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.utils import is_accelerate_available
from transformers.utils import logging as transformers_logging

from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.device.allocator import take_first_memory
from engine.device.device_memory import advice_on, free_bytes, refused_without_memory
from engine.failures import refused_as
from engine.model import attention_hook
from engine.model.eligibility import (
    config_of,
    longest_context,
    original_context,
    require_eligible,
    require_weights,
    served_class,
)
from engine.model.latent import keep_latents
from engine.model.probe import Probe, probe
from engine.model.refusals import advised
from engine.model.rehearsal import rehearse
from engine.model.weight_files import loaded_dtype, require_room
from engine.packed.folder import Held, header_of, held_of, load_held, require_quantizable, room_problem
from engine.packed.panel_file import PanelFile
from engine.recurrent.proof import require_equal_states
from engine.rope.long_rope import LongRope, rotate_by_text
from engine.rope.query_scale import scale_queries

LARGE = 1_000_000_000
"""From so many weights on, a dry run without them comes first: it takes a second, and reading them many."""

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its device, in evaluation mode, switched to the paged attention but not bound to a backend yet.

    ``max_context`` is what the model's positions allow, in tokens; ``limit`` says what shortened it, if anything did.
    ``long_rope`` rotates the tokens of its steps, where texts within that context are rotated in two ways. ``panels``
    keeps those of its matrices for the next start.
    """

    module: Any
    probe: Probe
    max_context: int
    limit: str
    config_eos_ids: tuple[int, ...]
    long_rope: LongRope | None = None
    panels: PanelFile | None = None


def load_model(config: EngineConfig, progress: Progress) -> LoadedModel:
    """Load the folder ``config.path``. Raises ``ModelRefused`` naming the layer and the reason.

    ``dtype`` "auto" is the checkpoint's own on a GPU and float32 on a CPU, where half precision is slower; ``device``
    "auto" is the first GPU, else the CPU.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_default_handler()  # what it says goes into the log of the process
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
    attention_hook.register()
    folder = Path(config.path)
    model_config = config_of(folder)
    with advised(model_config):
        require_eligible(model_config)
    num_weights = require_weights(folder, model_config)
    if num_weights > LARGE:
        rehearse(model_config)
    max_context, limit = longest_context(config, model_config)
    device = resolve_device(config.device)
    dtype = loading_dtype(config.dtype, device)
    with refused_without_memory("anything", device, advice_on(device)):
        take_first_memory(device)
    header = header_of(folder)
    require_quantizable(config, header, model_config, device, loaded_dtype(model_config, dtype, torch.bfloat16))
    held = held_of(header, model_config, config)
    if held is None:
        require_room(folder, model_config, num_weights, dtype, device)
    else:
        dtype = loaded_dtype(model_config, dtype, torch.bfloat16)
        what = f"the {num_weights} weights in {folder}"
        if problem := room_problem(held, what, num_weights, config, dtype, device, free_bytes(device)):
            raise ModelRefused(problem)
    module, panels = _load_weights(config, held, model_config, dtype, device, progress)
    text_config = model_config.get_text_config()
    with advised(model_config):
        scale_queries(module)
        probed = keep_latents(partial(probe, module, text_config)).grouped(max_context)
        require_equal_states(probed.mixers, text_config.hidden_size)
        original, long_rope = original_context(model_config), None
        if original is not None and original < max_context:
            long_rope = rotate_by_text(module, original, max_context)
    return LoadedModel(module, probed, max_context, limit, _eos_ids(module), long_rope, panels)


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
        raise ModelRefused(f"device {name!r} is not available: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


# --- Weights -------------------------------------------------------------------------------------


def loading_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """The type that a setting asks for; "auto" on a GPU is the checkpoint's own. Raises ``ModelRefused``."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelRefused(f"dtype {name!r} is not supported; use auto, float32, bfloat16 or float16")
    return dtype


def _load_weights(
    wanted: EngineConfig,
    held: Held | None,
    config: Any,
    dtype: torch.dtype | str,
    device: torch.device,
    progress: Progress,
) -> tuple[nn.Module, PanelFile | None]:
    folder, model_class, panels = Path(wanted.path), served_class(config), None
    keywords = {
        "dtype": dtype,
        # Straight to the device; without accelerate, by way of the machine's memory.
        "device_map": {"": device} if is_accelerate_available() else None,
        "attn_implementation": "eager",
    }
    with (
        _reported(progress),
        refused_as(f"the weights in {folder} cannot be loaded"),
        refused_without_memory(f"the weights in {folder}", device, advice_on(device)),
    ):
        if held is None:
            module, report = model_class.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **keywords,
            )
        else:
            module, report, panels = load_held(held, model_class, config, wanted, device, **keywords)
            if (folder / "generation_config.json").is_file():
                module.generation_config = GenerationConfig.from_pretrained(folder)
        model: nn.Module = module.eval().to(device)
    if "logits_to_keep" not in signature(type(model).forward).parameters:
        model.register_forward_hook(_cut_logits, with_kwargs=True)
    absent = sorted(report["missing_keys"])
    if absent:
        raise ModelRefused(f"{folder} lacks {len(absent)} weights of {config.model_type}, among them {absent[0]}")
    return model, panels


def _cut_logits(_model: nn.Module, _args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
    """What some models were asked for, of the logits of all tokens that they compute."""
    output.logits = output.logits[:, keywords["logits_to_keep"]]


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
        shown = 0
        for done, item in enumerate(self._items):
            if done * 100 // total > shown:
                shown = done * 100 // total
                self._progress(self._stage, done / total)
            yield item

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_args, **_keywords: None


def _eos_ids(module: Any) -> tuple[int, ...]:
    """End tokens of the generation settings and of the configuration, each an id, a list of ids or absent."""
    found: set[int] = set()
    for source in (module.generation_config, module.config, module.config.get_text_config()):
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return tuple(sorted(found))

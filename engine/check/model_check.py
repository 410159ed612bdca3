"""What a configuration tells of a model, and whether it can be served here."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.api.model_report import ModelReport
from engine.cache.kv_tensors import KVCache
from engine.cache.layout import group_demands, plan_caches, sequence_bytes
from engine.cache.state_tensors import slot_bytes
from engine.check.model_parts import active_parameters, inputs_of
from engine.device.device_memory import all_bytes, free_bytes
from engine.gguf.prepare import describe, require_tensors, write_details
from engine.model.config_file import read_config
from engine.model.eligibility import (
    config_of,
    described,
    longest_context,
    method_of_model,
    most_weights,
    original_context,
    require_eligible,
    require_weights,
)
from engine.model.loader import loading_dtype, resolve_device
from engine.model.probe import Probe
from engine.model.refusals import advised
from engine.model.rehearsal import Rehearsed, rehearse
from engine.model.weight_files import loaded_dtype, room_problem, stored_dtype
from engine.native.compiled.machine_code import require_code
from engine.native.decoder import require_known, require_one_rotation
from engine.native.errors import NotNative
from engine.packed.folder import (
    Measured,
    Planned,
    Unfetched,
    bytes_of_choices,
    header_of,
    held_of,
    require_quantizable,
    stay_in_blocks,
)
from engine.packed.folder import room_problem as blocks_room_problem
from engine.packed.places import Target
from engine.platforms.recipe import platform_of
from engine.weights.usable import GGUF_LINK


def report_on(config: EngineConfig, held: int | None = None, details: Path | None = None) -> ModelReport:
    """All that is known of the model at ``config.path``, a folder or a GGUF file, of which no weight is loaded.

    ``held`` are the bytes of the weights of a folder that does not have them yet. Into the folder ``details`` goes what
    a GGUF file says of its tokenizer and its sampling. A model that cannot be served has ``refused`` set, beside what
    was found out before.
    """
    facts: dict[str, Any] = {}
    try:
        _collect(config, held, details, facts)
    except ModelRefused as refusal:
        facts["refused"] = str(refusal)
    return ModelReport(**facts)


def _collect(config: EngineConfig, held: int | None, details: Path | None, facts: dict[str, Any]) -> None:
    path = Path(config.path)
    header = header_of(path)
    has_weights = header is not None or any(path.glob("*.safetensors"))
    if path.is_file():
        model_config, header = describe(path)
    else:
        model_config = config_of(path) if has_weights else read_config(path)
    facts |= {"model_type": model_config.model_type, "inputs": inputs_of(model_config)}
    facts["class_name"] = next(iter(getattr(model_config, "architectures", None) or ()), "")
    with advised(model_config):
        require_eligible(model_config)
    if header is not None:
        require_tensors(header, model_config)
        if details is not None:
            (details / GGUF_LINK).symlink_to(path.resolve())
            write_details(details / GGUF_LINK, header)
    elif has_weights:
        require_weights(path, model_config)
    count = sum(weight.numel() for weight in described(model_config).parameters())
    if held is not None and count > most_weights(model_config, held):
        raise ModelRefused(
            f"its config.json describes {count} weights, but its *.safetensors have {held} bytes; they do not belong "
            "to the same model"
        )
    facts["parameters"] = count
    text = model_config.get_text_config()
    try:
        device = resolve_device(config.device)
    except ModelRefused as refusal:
        facts["no_device"] = str(refusal)
        device = torch.device("cpu")
    stored = _stored(path, model_config, any(path.glob("*.safetensors")), count, held)
    loaded = loaded_dtype(model_config, loading_dtype(config.dtype, device), stored)
    rehearsed = rehearse(model_config, loaded)
    facts |= {
        "class_name": type(rehearsed.model).__name__,
        "undecided": rehearsed.undecided,
        "active_parameters": active_parameters(rehearsed.model, text),
        "layers": _kinds(rehearsed.probe, text),
    }
    facts["longest_context"], facts["context_limit"] = longest_context(EngineConfig(path=config.path), model_config)
    context, _ = longest_context(config, model_config)
    if "no_device" in facts:
        return
    require_quantizable(config, header, model_config, device, loaded)
    found: Measured | None = None
    in_blocks, method = stay_in_blocks(config, device, loaded), method_of_model(model_config)
    if header is not None or (has_weights and method is not None):
        found = held_of(header, model_config, config)
    elif method is not None and in_blocks:
        if held is None:
            return  # only its files tell what it takes
        found = Unfetched(held, method)
    elif in_blocks:
        facts["weights_by_choice"] = tuple(
            bytes_of_choices(model := described(model_config), Target(device, loaded)).items()
        )
        found = None if config.quantize == "none" else Planned(model, config.quantize)
    _measure(config, found, rehearsed, context, device, stored, loaded, facts)


def _stored(folder: Path, config: Any, has_weights: bool, count: int, held: int | None) -> torch.dtype:
    """The type of the weights' files; of files that are not there what config.json says, else what their size says."""
    if has_weights:
        return stored_dtype(folder)
    for told in (config.dtype, config.get_text_config().dtype):  # composite ones may name it for their parts only
        if isinstance(told, torch.dtype):
            return told
    return torch.bfloat16 if held is not None and held < 3 * count else torch.float32


def _measure(
    config: EngineConfig,
    held: Measured | None,
    rehearsed: Rehearsed,
    context: int,
    device: torch.device,
    stored: torch.dtype,
    loaded: torch.dtype,
    facts: dict[str, Any],
) -> None:
    """Add what the model takes in memory on the device, and how it is computed there."""
    count = int(facts["parameters"])
    target, in_blocks = Target(device, loaded), held is not None and stay_in_blocks(config, device, loaded)
    weights = held.bytes_in_blocks(target) if held is not None and in_blocks else count * loaded.itemsize
    fp8 = config.kv_dtype == "fp8"
    platform = platform_of(device)
    platform.check(config)
    facts |= {
        "device": _name(device),
        "device_bytes": all_bytes(device),
        "free_bytes": free_bytes(device),
        "weights_dtype": held.kinds(target) if held is not None and in_blocks else _shown(loaded),
        "weights_bytes": weights,
        "kv_dtype": "fp8" if fp8 else _shown(loaded),
        "block_size": config.block_size,
        "context": context,
    }
    what, room = f"its {count} weights", all_bytes(device)
    if held is not None:
        problem = blocks_room_problem(held, what, count, config, loaded, device, room)
    else:
        problem = room_problem(what, count, stored, loaded, device, room)
    if problem:
        facts["too_large"] = problem
    if rehearsed.probe is None:
        return
    grouped = rehearsed.probe.grouped(context)
    demands = group_demands(grouped.shapes, grouped.windows, config.block_size, loaded, fp8=fp8)
    facts["kv_bytes_per_token"] = sum(demand.bytes_per_block for demand in demands) // config.block_size
    facts["state_bytes"] = slot_bytes(rehearsed.probe.states)
    facts["context_bytes"] = sequence_bytes(demands, context, config.block_size)
    if not facts.get("too_large"):
        try:
            budget = platform.cache_bytes(config.kv_memory, weights)
            running = config.max_running or platform.max_running
            plan = plan_caches(budget, demands, config.block_size, context, running)
            facts["cache_tokens"] = max(plan.max_context, plan.groups[0].num_blocks * config.block_size)
        except ModelRefused:
            facts["cache_tokens"] = 0  # what is free now does not even hold the weights
    facts["not_native"] = _why_not_native(rehearsed, config, context, device, loaded)
    facts["native"] = not facts["not_native"]


def _why_not_native(
    rehearsed: Rehearsed, config: EngineConfig, context: int, device: torch.device, dtype: torch.dtype
) -> str:
    """Why the model is computed by torch; empty where it is built so that C code computes it."""
    assert rehearsed.probe is not None
    if not config.native:
        return "native is off in the configuration"
    try:
        no_blocks = KVCache([], 1, config.block_size, dtype=dtype, device=device)
        require_known(rehearsed.model, rehearsed.probe.layers, no_blocks)
        require_one_rotation(original_context(rehearsed.model.config), context)
        require_code()
    except NotNative as reason:
        return str(reason)
    return ""


def _kinds(probe: Probe | None, text: Any) -> tuple[tuple[str, int], ...]:
    """How many layers there are of each kind, as they attend, or else as config.json says."""
    if probe is not None:
        windows = (layer.window for layer in probe.layers)
        counted = Counter(str(window) if window else "full attention" for window in windows)
        counted.update(f"recurrent ({type(mixer.module).__name__})" for mixer in probe.mixers)
    else:
        named = getattr(text, "layer_types", None) or ["of an unknown kind"] * text.num_hidden_layers
        counted = Counter(kind.replace("_", " ") for kind in named)
    return tuple(counted.items())


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def _shown(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

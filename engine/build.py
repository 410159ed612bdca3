"""Puts an engine together: model, cache, attention, runner, sampler, tokenizer."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from engine.core import Core
from engine.fusion import fuse
from engine.grammar import GrammarBuilder
from engine.graphs import CudaRecorder
from engine.kv import KVCache, KVPlan, block_bytes, memory_budget, plan_blocks
from engine.model import LoadedModel, Progress, load_model
from engine.runner import ModelRunner
from engine.sampling import BatchSampler
from engine.trial import attention_for, try_steps
from engine.types import EngineConfig, ModelInfo, ModelRefused

_log = logging.getLogger(__name__)


def build_core(config: EngineConfig, progress: Progress) -> Core:
    """Load everything that ``config`` names. ``progress`` is told the stage and a fraction from 0 to 1 within it.

    The context is shortened to what the cache can hold for one sequence; ``ModelInfo.max_context`` tells it. Raises
    ``ModelRefused``.
    """
    torch.set_num_threads(config.threads or _default_threads())
    progress("reading tokenizer", 0.0)
    tokenizer = load_tokenizer(Path(config.path))
    runner = build_runner(config, progress, tokenizer)
    progress("preparing grammars", 0.0)
    grammars = build_grammars(tokenizer, runner.info)
    return Core(runner, BatchSampler(), tokenizer, config, grammars=grammars)


def build_grammars(tokenizer: Tokenizer, info: ModelInfo) -> GrammarBuilder | None:
    """None, with a warning, for a tokenizer that llguidance cannot work with."""
    try:
        return GrammarBuilder(tokenizer, info.vocab_size, info.eos_ids)
    except ValueError as error:
        _log.warning("Answers cannot follow a grammar with this model's tokenizer: %s", error)
        return None


def build_runner(config: EngineConfig, progress: Progress, tokenizer: Tokenizer) -> ModelRunner:
    """The model on its device with a cache as large as the configured memory allows."""
    model = load_model(config, progress)
    module = model.module
    if module.device.type == "cuda":
        progress("joining weights", 0.0)
        fuse(module)
    progress("allocating cache", 0.0)
    shapes = [layer.shape for layer in model.probe.layers]
    per_block = block_bytes(shapes, config.block_size, module.dtype)
    make_attention, reserved, spare = attention_for(module.device), 0, 0
    if module.device.type == "cuda":
        progress("trying the largest step", 0.0)
        trial = _model_info(model, KVPlan(1, model.max_context), config, tokenizer)
        make_attention, reserved = try_steps(model, trial, config, make_attention)
        spare = 1  # for what pads the recorded steps
    budget = memory_budget(config.kv_memory, module.device, reserved) - spare * per_block
    plan = plan_blocks(budget, per_block, config.block_size, model.max_context, config.max_running)
    cache = KVCache(shapes, plan.num_blocks + spare, config.block_size, dtype=module.dtype, device=module.device)
    attention = make_attention(cache, {layer.sliding_window for layer in model.probe.layers})
    _log_summary(model, plan, config.block_size, per_block, reserved)
    runner = ModelRunner(model, attention, _model_info(model, plan, config, tokenizer))
    if module.device.type == "cuda" and config.cuda_graphs:
        _record_decodes(runner, plan.num_blocks, progress)
    return runner


def _record_decodes(runner: ModelRunner, scratch_block: int, progress: Progress) -> None:
    """Have decode steps replayed where they can be recorded; else they are computed as all others are."""
    try:
        runner.record_decodes(scratch_block, CudaRecorder(), progress)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        _log.warning("Decode steps cannot be recorded and will be slower: %s: %s", type(error).__name__, reason)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer.json, or what transformers makes of its other tokenizer files."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return Tokenizer.from_file(str(path))
    from transformers import AutoTokenizer

    try:
        wrapper = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise ModelRefused(f"{folder} holds no tokenizer that can be read: {error}") from error
    backend = getattr(wrapper, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelRefused(f"{folder} holds no tokenizer.json, and {type(wrapper).__name__} cannot be converted to one")
    return backend


def _default_threads() -> int:
    """What OMP_NUM_THREADS says, as with every torch program; else all cores, less one for the front end beyond two."""
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        threads: int = torch.get_num_threads()
        return threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores - 1 if cores > 2 else cores


def _model_info(model: LoadedModel, plan: KVPlan, config: EngineConfig, tokenizer: Tokenizer) -> ModelInfo:
    module = model.module
    eos_ids = {*model.config_eos_ids, *_tokenizer_eos_ids(Path(config.path), tokenizer)}
    return ModelInfo(
        model_type=module.config.model_type,
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        dtype=str(module.dtype).removeprefix("torch."),
        device=str(module.device),
        vocab_size=model.probe.vocab_size,
        max_context=plan.max_context,
        block_size=config.block_size,
        num_blocks=plan.num_blocks,
        max_running=config.max_running,
        eos_ids=tuple(sorted(token for token in eos_ids if 0 <= token < model.probe.vocab_size)),
    )


def _tokenizer_eos_ids(folder: Path, tokenizer: Tokenizer) -> list[int]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return []
    eos: Any = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    content = eos.get("content") if isinstance(eos, dict) else eos
    token_id = tokenizer.token_to_id(content) if isinstance(content, str) else None
    return [] if token_id is None else [token_id]


def _log_summary(model: LoadedModel, plan: KVPlan, block_size: int, bytes_per_block: int, reserved: int) -> None:
    tokens = plan.num_blocks * block_size
    _log.info(
        "KV cache: %d tokens in %.0f MiB, %.1f sequences at the full context of %d tokens",
        tokens,
        plan.num_blocks * bytes_per_block / 2**20,
        tokens / plan.max_context,
        plan.max_context,
    )
    if reserved:
        _log.info("Beside weights and cache, the largest steps take %.0f MiB", reserved / 2**20)
    if model.limit:
        _log.warning("The context is %d tokens: %s", model.max_context, model.limit)
    if plan.max_context < model.max_context:
        _log.warning(
            "The context is shortened from %d to %d tokens, all that the KV cache holds; raise kv_memory for more",
            model.max_context,
            plan.max_context,
        )

"""Puts an engine together: model, cache, attention, runner, sampler, tokenizer."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from engine.api.engine import EngineConfig, ModelInfo
from engine.api.errors import ModelRefused
from engine.attention.gather import ReferenceAttention
from engine.cache.kv_tensors import KVCache
from engine.cache.layout import block_bytes, plan_blocks
from engine.cache.memory import memory_budget, running_limit
from engine.constraints.contracts import Grammars
from engine.constraints.missing import MissingGrammars
from engine.core.core import Core
from engine.device.cpu_count import cores
from engine.failures import NOT_FAILURES, sentence
from engine.model.loader import LoadedModel, Progress, load_model
from engine.model.summary import log_summary, model_info
from engine.native.build import native_runner
from engine.native.errors import NotNative, WeightsGone
from engine.runner.cuda import gpu_runner
from engine.runner.torch_runner import ModelRunner
from engine.sampling import BatchSampler
from engine.scheduling.contracts import Runner

_log = logging.getLogger(__name__)


def build_core(config: EngineConfig, progress: Progress) -> Core:
    """Load everything that ``config`` names. ``progress`` is told the stage and a fraction from 0 to 1 within it.

    The context is shortened to what the cache can hold for one sequence; ``ModelInfo.max_context`` tells it. Raises
    ``ModelRefused``.
    """
    torch.set_num_threads(config.threads or default_threads())
    progress("reading tokenizer", 0.0)
    tokenizer = load_tokenizer(Path(config.path))
    runner = build_runner(config, progress, tokenizer)
    progress("preparing grammars", 0.0)
    grammars = build_grammars(tokenizer, runner.info)
    return Core(runner, BatchSampler(), tokenizer, config, grammars=grammars)


def build_grammars(tokenizer: Tokenizer, info: ModelInfo) -> Grammars | None:
    """None, with a warning, for a tokenizer that llguidance cannot work with."""
    try:
        from engine.constraints.grammar import GrammarBuilder
    except ModuleNotFoundError as error:
        if error.name != "llguidance":
            raise
        return MissingGrammars()
    try:
        return GrammarBuilder(tokenizer, info.vocab_size, info.eos_ids)
    except NOT_FAILURES:
        raise
    except BaseException as error:  # noqa: BLE001 - the model is served without grammars
        _log.warning("Answers cannot follow a grammar with this model's tokenizer: %s", sentence(error))
        return None


def build_runner(config: EngineConfig, progress: Progress, tokenizer: Tokenizer) -> Runner:
    """The model on its device with a cache as large as the configured memory allows."""
    model = load_model(config, progress)
    eos_ids = {*model.config_eos_ids, *_tokenizer_eos_ids(Path(config.path), tokenizer)}
    if model.module.device.type == "cuda":
        return gpu_runner(model, config, eos_ids, progress)
    progress("allocating cache", 0.0)
    shapes, dtype = [layer.shape for layer in model.probe.layers], model.module.dtype
    per_block = block_bytes(shapes, config.block_size, dtype)
    budget = memory_budget(config.kv_memory, model.module.device)
    running = running_limit(config.max_running, model.module.device)
    plan = plan_blocks(budget, per_block, config.block_size, model.max_context, running)
    cache = KVCache(shapes, plan.num_blocks, config.block_size, dtype=dtype, device=model.module.device)
    info = model_info(model, plan, config, eos_ids)
    log_summary(model, plan, config.block_size, per_block)
    try:
        return native_runner(model, cache, info, config, progress)
    except NotNative as reason:
        level = logging.WARNING if config.native else logging.INFO
        # In words: a record of the log that somebody keeps would keep the exception, and so what it holds.
        _log.log(level, "Computed by torch, which is slower, and not natively: %s", str(reason))
        weights_gone = isinstance(reason, WeightsGone)
    if weights_gone:
        # Only here, where the exception and with it the packed weights are gone: both would not fit into the memory.
        del model
        model = load_model(config, progress)
    return _torch_runner(model, cache, info)


def _torch_runner(model: LoadedModel, cache: KVCache, info: ModelInfo) -> ModelRunner:
    attention = ReferenceAttention(cache, {layer.sliding_window for layer in model.probe.layers})
    return ModelRunner(model, attention, info)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer.json, or what transformers makes of its other tokenizer files."""
    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            return Tokenizer.from_file(str(path))
        from transformers import AutoTokenizer

        wrapper = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except NOT_FAILURES:
        raise
    except BaseException as error:
        raise ModelRefused(f"{folder} holds no tokenizer that can be read: {sentence(error)}") from error
    backend = getattr(wrapper, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelRefused(f"{folder} holds no tokenizer.json, and {type(wrapper).__name__} cannot be converted to one")
    return backend


def default_threads() -> int:
    """What OMP_NUM_THREADS says, as with every torch program; else all cores, less one for the front end beyond two."""
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        threads: int = torch.get_num_threads()
        return threads
    usable = cores()
    return usable - 1 if usable > 2 else usable


def _tokenizer_eos_ids(folder: Path, tokenizer: Tokenizer) -> list[int]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return []
    try:
        eos: Any = json.loads(path.read_bytes()).get("eos_token")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelRefused(f"{path} is no JSON object that can be read: {sentence(error)}") from error
    content = eos.get("content") if isinstance(eos, dict) else eos
    token_id = tokenizer.token_to_id(content) if isinstance(content, str) else None
    return [] if token_id is None else [token_id]

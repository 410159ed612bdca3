"""Builds the core of an engine from a model folder: tokenizer, runner, sampler, grammars.

Torch is imported only where no earlier start has left an image of the model (``engine.image``).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engine.api.engine import EngineConfig, ModelInfo
from engine.api.errors import ModelRefused
from engine.constraints.contracts import Grammars
from engine.constraints.missing import MissingGrammars
from engine.core.core import Core
from engine.device.cpu_count import default_threads
from engine.failures import NOT_FAILURES, refused_as, sentence
from engine.image.start import runner_of_image
from engine.sampling import BatchSampler
from engine.scheduling.contracts import Runner

_log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]


def build_core(config: EngineConfig, progress: Progress) -> Core:
    """Load everything that ``config`` names. ``progress`` gets the stage and a fraction from 0 to 1 within it.

    The context is shortened to what the cache can hold for one sequence, see ``ModelInfo.max_context``. Raises
    ``ModelRefused``.
    """
    progress("reading tokenizer", 0.0)
    tokenizer = load_tokenizer(Path(config.path))
    mapped = runner_of_image(config, progress)
    if mapped is not None:
        progress("preparing grammars", 0.0)
        return Core(mapped, BatchSampler(), tokenizer, config, grammars=build_grammars(tokenizer, mapped.info))
    progress("importing torch", 0.0)
    import torch

    from engine.platforms.recipe import platform_of

    torch.set_num_threads(config.threads or default_threads())
    runner = build_runner(config, progress, tokenizer)
    progress("preparing grammars", 0.0)
    grammars = build_grammars(tokenizer, runner.info)
    platform = platform_of(torch.device(runner.info.device))
    sampler, cost = platform.sampler(runner, config), platform.step_cost(runner)
    return Core(runner, sampler, tokenizer, config, cost=cost, ahead=platform.runs_ahead, grammars=grammars)


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
    """The model on its device with a cache as large as the configured memory allows. Raises ``ModelRefused``."""
    from engine.model.loader import load_model
    from engine.platforms.recipe import start_model

    eos_ids = _tokenizer_eos_ids(Path(config.path), tokenizer)
    return start_model(lambda: load_model(config, progress), config, eos_ids, progress)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer.json, or what transformers makes of its other tokenizer files."""
    path = folder / "tokenizer.json"
    with refused_as(f"{folder} holds no tokenizer that can be read"):
        if path.is_file():
            return Tokenizer.from_file(str(path))
        from transformers import AutoTokenizer

        wrapper = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    backend = getattr(wrapper, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelRefused(f"{folder} holds no tokenizer.json, and {type(wrapper).__name__} cannot be converted to one")
    return backend


def _tokenizer_eos_ids(folder: Path, tokenizer: Tokenizer) -> list[int]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return []
    try:
        eos: Any = json.loads(path.read_bytes()).get("eos_token")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelRefused(f"{path} cannot be read as a JSON object: {sentence(error)}") from error
    content = eos.get("content") if isinstance(eos, dict) else eos
    token_id = tokenizer.token_to_id(content) if isinstance(content, str) else None
    return [] if token_id is None else [token_id]

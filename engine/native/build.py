"""Decides whether a model is computed natively: its structure must be supported, and the results the model's own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from engine.api.engine import EngineConfig, ModelInfo
from engine.api.errors import ModelRefused
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.cache.kv_tensors import KVCache
from engine.cache.state_tensors import StateCache
from engine.closeness import difference
from engine.model import attention_hook
from engine.model.loader import LoadedModel, Progress
from engine.model.probe import set_attention
from engine.native.decoder import describe, require_known, require_one_rotation
from engine.native.errors import DifferentNumbers, NotNative, WeightsGone
from engine.native.library import load_library
from engine.native.runner import NativeRunner
from engine.native.states import NativeStates
from engine.native.verify import PRIME, TOLERANCE, read_turns, require_formula, ties
from engine.recurrent.proof import require_equal_states
from engine.scheduling.sequence import ScheduledChunk, Sequence

CHECKED_TOKENS = 40
CHECKED_TEXTS = 8
"""Of a model with experts, into which its tokens are split: one that rounding sends to another expert changes all that
follow it in its text."""
# What the code may raise on a model that it was not written for.
UNFORESEEN = (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


def native_runner(
    model: LoadedModel, cache: KVCache, info: ModelInfo, config: EngineConfig, progress: Progress
) -> NativeRunner:
    """A runner for ``model``, whose weights it takes over.

    Raises ``NotNative`` while the model is still whole, ``WeightsGone`` once its weights are gone. Unforeseen errors
    become one of these too, so that torch can still serve the model.
    """
    failure: type[NotNative] = NotNative
    try:
        if not config.native:
            raise NotNative("native is off in the configuration")
        structure = require_known(model.module, model.probe.layers, cache)
        require_one_rotation(info.original_context, info.max_context)
        tables = read_turns(model.module, info.max_context, model.probe.layers[0].shape.key_size)
        rotations = require_formula(model.module, structure, model.probe.layers, tables)
        progress("compiling", 0.0)
        code = load_library(None if config.cache_dir is None else Path(config.cache_dir) / "native")
        count = min(CHECKED_TOKENS, info.max_context)
        tokens = torch.arange(1, count + 1) * PRIME % model.probe.vocab_size
        texts = tokens.chunk(CHECKED_TEXTS if ties(structure, CHECKED_TEXTS) else 1)
        expected = [_own_logits(model.module, text) for text in texts]
        progress("packing weights", 0.0)
        failure = WeightsGone
        decoder = describe(structure, model.probe.layers, cache, rotations)
        runner = NativeRunner(code, decoder, info, torch.get_num_threads())
        apart = [_apart(runner, text.tolist(), logits) for text, logits in zip(texts, expected, strict=True)]
        worst = sorted(apart)[-1 - ties(structure, len(texts))]
        if worst > TOLERANCE:
            raise DifferentNumbers(f"its logits differ from the model's own by {worst:.1e} of the largest")
    except NotNative:
        raise
    except UNFORESEEN as error:
        raise failure(f"{type(error).__name__}: {error}") from error
    # Little is left for torch to do, and its busily waiting threads would take the cores from those of the C code.
    torch.set_num_threads(1)
    return runner


def native_states(model: LoadedModel, cache: StateCache, config: EngineConfig) -> NativeStates:
    """What advances the recurrent states of ``model`` in C, proved equal to its own mixers. Raises ``NotNative``."""
    if not config.native:
        raise NotNative("native is off in the configuration")
    try:
        code = load_library(None if config.cache_dir is None else Path(config.cache_dir) / "native")
        make = partial(NativeStates, code=code, threads=torch.get_num_threads())
        require_equal_states(model.probe.mixers, model.module.config.get_text_config().hidden_size, make)
        return make(cache)
    except (*UNFORESEEN, ModelRefused) as error:
        raise NotNative(f"{type(error).__name__}: {error}") from error


def _apart(runner: NativeRunner, tokens: list[int], expected: torch.Tensor) -> float:
    """How far logits are from the model's own: after a chunk, after more of the prompt, and after single tokens."""
    length = len(tokens)
    sequence = Sequence(Request("check", tuple(tokens[:1]), SamplingParams(1)), 0, [])
    # Every layer group has room for so few tokens.
    sequence.blocks = list(range(-(-length // runner.info.block_size)))
    sequence.other_tables = tuple(sequence.blocks for _ in runner.info.groups[1:])
    middle, apart = max(1, length // 2), []
    ends = sorted({middle, *range(min(middle + 2, length), length + 1)})
    for start, end in zip([0, *ends], ends, strict=False):
        sequence.tokens = tokens[:end]
        (found,) = runner.forward([ScheduledChunk(sequence, start, end - start)])
        apart.append(difference(torch.from_numpy(found), expected[end - 1]))
    return max(apart)


def _own_logits(module: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    set_attention(module, "eager")  # the one that every model has
    try:
        with torch.inference_mode():
            logits: torch.Tensor = module(input_ids=tokens[None], use_cache=False).logits[0]
    finally:
        set_attention(module, attention_hook.PAGED)
    return logits.float()

"""Turns GenerationConfig, the entry's defaults and the model's limits into sampling parameters."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.api.engine import ModelInfo
from engine.api.sampling import SAMPLING_FIELDS, SamplingField, SamplingParams, Thinking
from server.config.models_file import ModelSpec
from server.convert.chat_tokenizer import ChatTokenizer
from server.errors import InvalidArgument
from server.wire.generation import GenerationConfig

MAX_CALL_STARTS = 8
"""Of more, stop sequences see only what all calls begin with, and leave out what begins so."""
_NEVER = "\0"
"""Terminator of calls that only end with the answer: JSON cannot contain this character."""


def output_limit(spec: ModelSpec, info: ModelInfo) -> int:
    """The most tokens that an answer can have: ``outputTokenLimit`` of the model."""
    return min(spec.max_output_tokens, info.max_context)


def entry_default(field: SamplingField, spec: ModelSpec) -> float:
    """The value of ``field`` in requests that name none: the entry's, else the engine's."""
    configured: float | None = getattr(spec, field.name) if field.in_entry else None
    return field.default if configured is None else configured


def sampling_params(
    config: GenerationConfig, spec: ModelSpec, info: ModelInfo, end_ids: tuple[int, ...], prompt_tokens: int
) -> SamplingParams:
    """How the answer is sampled. A seed is drawn where the request has none. Raises ``InvalidArgument``.

    A request for temperature 0 asks for the likeliest tokens; a default penalty, which it cannot name, gives others.
    """
    if config.logprobs and not config.response_logprobs:
        raise InvalidArgument.at(
            "generation_config.logprobs",
            f"* GenerateContentRequest.generation_config.logprobs: {config.logprobs} needs responseLogprobs to be true",
        )
    limit = min(output_limit(spec, info), info.max_context - prompt_tokens)
    numbers: dict[str, Any] = {}
    for name, field in SAMPLING_FIELDS.items():
        asked = getattr(config, name) if field.wire_name else None
        is_unasked_penalty = name == "repetition_penalty" and config.temperature == 0
        default = field.default if is_unasked_penalty else entry_default(field, spec)
        number = default if asked is None else asked
        numbers[name] = min(number, info.vocab_size) if field.counts_tokens else number
    return SamplingParams(
        max_tokens=min(config.max_output_tokens or limit, limit),
        seed=secrets.randbits(31) if config.seed is None else config.seed,
        stop=tuple(config.stop_sequences),
        stop_ids=tuple(sorted({*end_ids, *info.eos_ids})),
        logprobs=(config.logprobs or 0) if config.response_logprobs else None,
        **numbers,
    )


def answer_syntax(
    sampling: SamplingParams,
    tokenizer: ChatTokenizer,
    calls: bool,
    thinking: Thinking | None,
    grammar: str | None,
    call_starts: Sequence[str] = (),
) -> SamplingParams:
    """``sampling`` with grammar, thoughts and markers of the answer. ``calls`` means that it may hold function calls,
    ``call_starts`` tell them from an answer that begins alike.

    Stop sequences apply to text, not inside calls. Where no marker ends a call, they do not apply after one either:
    calls end an answer.
    """
    family = tokenizer.family
    starts = call_starts if 0 < len(call_starts) <= MAX_CALL_STARTS else [family.call.sign or family.call.call_start]
    spans = [(start, family.call.terminator or _NEVER) for start in starts]
    return replace(
        sampling,
        grammar=grammar,
        thinking=thinking,
        markers=tokenizer.marker_ids if calls or family.thought else (),
        stop_exempt=(*family.exempt, *(spans if calls else ())),
    )


def capped(config: GenerationConfig, spec: ModelSpec, info: ModelInfo) -> list[str]:
    """The JSON paths of limits that are higher than the model's and therefore have no effect.

    Code written for cloud models asks for 65,536 tokens and means "as many as there are".
    """
    over = (config.max_output_tokens or 0) > output_limit(spec, info)
    return ["generationConfig.maxOutputTokens"] if over else []

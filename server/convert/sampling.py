"""GenerationConfig, the entry's defaults and the model's limits to sampling parameters."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TypeVar

from engine.api.engine import ModelInfo
from engine.api.requests import SamplingParams, Thinking
from server.config.models_file import ModelSpec
from server.convert.chat_tokenizer import ChatTokenizer
from server.errors import InvalidArgument
from server.wire.generation import GenerationConfig

Number = TypeVar("Number", int, float)

DEFAULT_TEMPERATURE = 1.0
DEFAULT_TOP_P = 1.0
DEFAULT_TOP_K = 0

_NEVER = "\0"
"""The end of calls that only the answer's end ends: JSON cannot hold this character."""


def output_limit(spec: ModelSpec, info: ModelInfo) -> int:
    """The most tokens that an answer can have: ``outputTokenLimit`` of the model."""
    return min(spec.max_output_tokens, info.max_context)


def sampling_params(
    config: GenerationConfig, spec: ModelSpec, info: ModelInfo, end_ids: tuple[int, ...], prompt_tokens: int
) -> SamplingParams:
    """How the answer is sampled. A seed is drawn where the request has none. Raises ``InvalidArgument``."""
    limit = min(output_limit(spec, info), info.max_context - prompt_tokens)
    return SamplingParams(
        max_tokens=min(config.max_output_tokens or limit, limit),
        temperature=_first(config.temperature, spec.temperature, DEFAULT_TEMPERATURE),
        top_p=_first(config.top_p, spec.top_p, DEFAULT_TOP_P),
        top_k=min(_first(config.top_k, spec.top_k, DEFAULT_TOP_K), info.vocab_size),
        seed=secrets.randbits(31) if config.seed is None else config.seed,
        presence_penalty=config.presence_penalty or 0.0,
        frequency_penalty=config.frequency_penalty or 0.0,
        stop=tuple(config.stop_sequences),
        stop_ids=tuple(sorted({*end_ids, *info.eos_ids})),
        logprobs=_logprobs(config),
    )


def answer_syntax(
    sampling: SamplingParams, tokenizer: ChatTokenizer, calls: bool, thinking: Thinking | None, grammar: str | None
) -> SamplingParams:
    """``sampling`` with all that the form of the answer asks of the engine. ``calls`` tells that there may be some:
    stop sequences are for what the model says, not for what it calls. Where nothing ends a call, none counts after it:
    calls end an answer."""
    family = tokenizer.family
    span = (family.call.trigger or family.call.call_start, family.call.terminator or _NEVER)
    return replace(
        sampling,
        grammar=grammar,
        thinking=thinking,
        markers=tokenizer.marker_ids if calls or family.thought else (),
        stop_exempt=(*family.exempt, *((span,) if calls else ())),
    )


def capped(config: GenerationConfig, spec: ModelSpec, info: ModelInfo) -> list[str]:
    """The JSON paths of limits that are higher than the model's and therefore have no effect.

    Code written for cloud models asks for 65,536 tokens and means "as many as there are".
    """
    over = (config.max_output_tokens or 0) > output_limit(spec, info)
    return ["generationConfig.maxOutputTokens"] if over else []


def _logprobs(config: GenerationConfig) -> int | None:
    if config.logprobs and not config.response_logprobs:
        raise InvalidArgument.at(
            "generation_config.logprobs",
            f"* GenerateContentRequest.generation_config.logprobs: {config.logprobs} needs responseLogprobs to be true",
        )
    return (config.logprobs or 0) if config.response_logprobs else None


def _first(asked: Number | None, configured: Number | None, default: Number) -> Number:
    if asked is not None:
        return asked
    return default if configured is None else configured

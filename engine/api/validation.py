"""Which requests can never be served: every number is checked here before it reaches a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from engine.api.engine import EngineConfig, ModelInfo
from engine.api.requests import Request
from engine.api.sampling import MAX_LOGPROBS, SAMPLING_FIELDS, SamplingParams

# Far beyond any use; they bound what one request can make the engine remember.
MAX_STOPS = 64
MAX_STOP_LENGTH = 4096
MAX_STOP_EXEMPT = 16
MAX_MARKER_LENGTH = 64
MAX_RESUME_POINTS = 8
MAX_GRAMMAR_LENGTH = 2**20
SEED_RANGE = range(-(2**63), 2**63)


def refusal(request: Request, info: ModelInfo, config: EngineConfig) -> str | None:
    """Why the request cannot be served, in one sentence with field, value and limit; None if it can."""
    return next(_problems(request, info, config), None)


def _problems(request: Request, info: ModelInfo, config: EngineConfig) -> Iterator[str]:
    prompt = request.prompt
    if not prompt:
        yield "prompt is empty; give at least one token."
        return
    if len(prompt) >= info.max_context:
        because = f" ({info.context_limit})" if info.context_limit else ""
        yield (
            f"prompt has {len(prompt)} tokens, but the context holds {info.max_context}, prompt and answer together"
            f"{because}; shorten it to at most {info.max_context - 1}."
        )
    outside = min(prompt) if min(prompt) < 0 else max(prompt)
    if not 0 <= outside < info.vocab_size:
        yield f"prompt has the token id {outside}; the model knows 0 to {info.vocab_size - 1}."
    most = info.max_running + config.max_waiting
    if not 1 <= request.candidates <= most:
        yield f"candidates is {request.candidates}; ask for 1 to {most}."
    if len(request.resume_points) > MAX_RESUME_POINTS:
        yield f"resume_points has {len(request.resume_points)} entries; give at most {MAX_RESUME_POINTS}."
    if outside_prompt := [point for point in request.resume_points if not 0 <= point <= len(prompt)]:
        yield f"resume_points has {outside_prompt[0]}; give 0 to {len(prompt)}, the tokens of the prompt."
    if request.deadline is not None and request.deadline != request.deadline:
        yield "deadline is not a number; give a monotonic instant in seconds, or none."
    yield from _sampling_problems(request.sampling, info)


def _sampling_problems(sampling: SamplingParams, info: ModelInfo) -> Iterator[str]:
    if sampling.max_tokens < 1:
        yield f"max_tokens is {sampling.max_tokens}; ask for at least 1."
    for field in SAMPLING_FIELDS.values():
        value = getattr(sampling, field.name)
        if value not in field.computed:
            yield f"{field.name} is {value}; {field.advice}."
    if sampling.seed not in SEED_RANGE:
        yield f"seed is {sampling.seed}; give an integer of 64 bits."
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= MAX_LOGPROBS:
        yield f"logprobs is {sampling.logprobs}; ask for 0 to {MAX_LOGPROBS}."
    for name, entries, kind, most in (
        ("stop", [(text,) for text in sampling.stop], "strings", MAX_STOPS),
        ("stop_exempt", sampling.stop_exempt, "pairs", MAX_STOP_EXEMPT),
    ):
        if len(entries) > most:
            yield f"{name} has {len(entries)} {kind}; give at most {most}."
        for text in chain(*entries):
            if not 1 <= len(text) <= MAX_STOP_LENGTH:
                yield f"{name} has a string of {len(text)} characters; give 1 to {MAX_STOP_LENGTH}."
    if sampling.grammar is not None and not 1 <= len(sampling.grammar) <= MAX_GRAMMAR_LENGTH:
        yield f"grammar has {len(sampling.grammar)} characters; give 1 to {MAX_GRAMMAR_LENGTH}."
    special = {"markers": sampling.markers}
    thinking = sampling.thinking
    if thinking is not None:
        special |= {"thinking.start": thinking.start, "thinking.end": thinking.end}
        if not thinking.end:
            yield "thinking.end is empty; give the token ids that end thoughts."
        longest = max(len(thinking.start), len(thinking.end))
        if longest > MAX_MARKER_LENGTH:
            yield f"thinking has a marker of {longest} tokens; give at most {MAX_MARKER_LENGTH}."
        if thinking.budget is not None and thinking.budget < 0:
            yield f"thinking.budget is {thinking.budget}; give 0 or more, or none."
    for name, token_ids in special.items():
        outside = next((token_id for token_id in token_ids if not 0 <= token_id < info.vocab_size), None)
        if outside is not None:
            yield f"{name} has the token id {outside}; the model knows 0 to {info.vocab_size - 1}."

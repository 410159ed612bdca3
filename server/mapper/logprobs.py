"""Sampled tokens and their log-probabilities as ``logprobsResult``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from engine.api.events import TokenLogprobs

TokenText = Callable[[int], str]


class ScoredToken(NamedTuple):
    """A sampled token and the raw log-probabilities at its step."""

    token_id: int
    logprobs: TokenLogprobs


def logprobs_result(tokens: Sequence[ScoredToken], token_text: TokenText) -> dict[str, Any]:
    """``chosenCandidates`` and ``topCandidates``, one entry per token each; the latter only where any were asked for.

    ``logProbabilitySum`` sums those of the sampled tokens.
    """
    chosen = [_candidate(token.token_id, token.logprobs.chosen, token_text) for token in tokens]
    result: dict[str, Any] = {"chosenCandidates": chosen}
    if any(token.logprobs.top for token in tokens):
        result["topCandidates"] = [
            {"candidates": [_candidate(top.token_id, top.logprob, token_text) for top in token.logprobs.top]}
            for token in tokens
        ]
    return result | {"logProbabilitySum": sum(token.logprobs.chosen for token in tokens)}


def _candidate(token_id: int, logprob: float, token_text: TokenText) -> dict[str, Any]:
    return {"token": token_text(token_id), "tokenId": token_id, "logProbability": logprob}

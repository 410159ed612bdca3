"""Sampled tokens and their log-probabilities as ``logprobsResult``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from engine.api.events import TokenLogprobs

TokenText = Callable[[int], str]


class Step(NamedTuple):
    """One decoding step: the sampled token and the raw log-probabilities there."""

    token_id: int
    logprobs: TokenLogprobs


def logprobs_result(steps: Sequence[Step], token_text: TokenText) -> dict[str, Any]:
    """``chosenCandidates`` and ``topCandidates``, one entry per step each; the latter only where any were asked for.

    ``logProbabilitySum`` sums the chosen tokens of these steps.
    """
    chosen = [_candidate(step.token_id, step.logprobs.chosen, token_text) for step in steps]
    result: dict[str, Any] = {"chosenCandidates": chosen}
    if any(step.logprobs.top for step in steps):
        result["topCandidates"] = [
            {"candidates": [_candidate(top.token_id, top.logprob, token_text) for top in step.logprobs.top]}
            for step in steps
        ]
    return result | {"logProbabilitySum": sum(step.logprobs.chosen for step in steps)}


def _candidate(token_id: int, logprob: float, token_text: TokenText) -> dict[str, Any]:
    return {"token": token_text(token_id), "tokenId": token_id, "logProbability": logprob}

"""Token counts as ``usageMetadata``: always the running totals of the request, never what a chunk adds."""

from __future__ import annotations

from typing import Any


def usage_metadata(prompt: int, candidates: int, thoughts: int = 0, cached: int | None = None) -> dict[str, Any]:
    """``prompt`` includes the ``cached`` tokens, which are known (not None) when the request is done.

    ``candidates`` does not include ``thoughts``, the total does.
    """
    usage: dict[str, Any] = {
        "promptTokenCount": prompt,
        "candidatesTokenCount": candidates,
        "totalTokenCount": prompt + candidates + thoughts,
        "promptTokensDetails": text_tokens(prompt),
        "candidatesTokensDetails": text_tokens(candidates),
    }
    if thoughts:
        usage["thoughtsTokenCount"] = thoughts
    if cached is not None:
        usage |= {"cachedContentTokenCount": cached, "cacheTokensDetails": text_tokens(cached)}
    return usage


def text_tokens(count: int) -> list[dict[str, Any]]:
    """A count by modality; all tokens are text."""
    return [{"modality": "TEXT", "tokenCount": count}]

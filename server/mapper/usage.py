"""Token counts as ``usageMetadata``: always the running totals of the request, never what a chunk adds."""

from __future__ import annotations

from typing import Any


def usage_metadata(
    prompt: int, candidates: int, thoughts: int = 0, cached: int | None = None, documents: int = 0
) -> dict[str, Any]:
    """``prompt`` includes the ``cached`` tokens, which are known (not None) when the request is done, and those of
    ``documents``. ``candidates`` does not include ``thoughts``, the total does.

    Where there are documents, the cached tokens are not split by modality: which of them are a document's is not known.
    """
    usage: dict[str, Any] = {
        "promptTokenCount": prompt,
        "candidatesTokenCount": candidates,
        "totalTokenCount": prompt + candidates + thoughts,
        "promptTokensDetails": prompt_details(prompt, documents),
        "candidatesTokensDetails": text_tokens(candidates),
    }
    if thoughts:
        usage["thoughtsTokenCount"] = thoughts
    if cached is not None:
        usage["cachedContentTokenCount"] = cached
        if not documents:
            usage["cacheTokensDetails"] = text_tokens(cached)
    return usage


def prompt_details(prompt: int, documents: int) -> list[dict[str, Any]]:
    """The tokens of a prompt by modality."""
    of_documents = [{"modality": "DOCUMENT", "tokenCount": documents}] if documents else []
    return [*text_tokens(prompt - documents), *of_documents]


def text_tokens(count: int) -> list[dict[str, Any]]:
    """A count by modality, where all tokens are text."""
    return [{"modality": "TEXT", "tokenCount": count}]

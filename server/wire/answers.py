"""The fields that answers of the API can have, which a mask may name: those of the API's own messages.

A message is a mapping of the JSON names of its fields to their messages; a field without any is ``VALUE``. What lies
below ``ANYTHING`` is data of the caller, or a message that this server never sends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, Any]
"""Recursive: the values are ``Fields``, or ``ANYTHING``."""

VALUE: Fields = {}
ANYTHING = None


def _values(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), VALUE)


_TOKENS = _values("modality tokenCount")
_PART: Fields = {
    **_values("text thought thoughtSignature"),
    "inlineData": _values("mimeType data displayName"),
    "fileData": _values("fileUri mimeType displayName"),
    "functionCall": {**_values("id name willContinue"), "args": ANYTHING, "partialArgs": ANYTHING},
    "functionResponse": {
        **_values("id name willContinue scheduling"),
        "response": ANYTHING,
        "parts": {"inlineData": _values("mimeType data")},
    },
    "executableCode": _values("code id language"),
    "codeExecutionResult": _values("output outcome id"),
    **dict.fromkeys(
        ("toolCall", "toolResponse", "videoMetadata", "mediaResolution", "mediaProcessing", "partMetadata"), ANYTHING
    ),
}
_LOGPROB = _values("token tokenId logProbability")
_CANDIDATE: Fields = {
    **_values("index finishReason finishMessage tokenCount avgLogprobs continuationToken"),
    "content": {"role": VALUE, "parts": _PART},
    "logprobsResult": {
        "logProbabilitySum": VALUE,
        "chosenCandidates": _LOGPROB,
        "topCandidates": {"candidates": _LOGPROB},
    },
    "citationMetadata": {
        "citationSources": _values("startIndex endIndex uri license"),
        "citations": ANYTHING,
    },
    **dict.fromkeys(("safetyRatings", "groundingAttributions", "groundingMetadata", "urlContextMetadata"), ANYTHING),
}
GENERATE_CONTENT: Fields = {
    **_values("modelVersion responseId createTime"),
    "candidates": _CANDIDATE,
    "promptFeedback": {**_values("blockReason blockReasonMessage"), "safetyRatings": ANYTHING},
    "modelStatus": _values("message modelStage retirementTime"),
    "usageMetadata": {
        **_values("promptTokenCount candidatesTokenCount thoughtsTokenCount totalTokenCount cachedContentTokenCount"),
        **_values("toolUsePromptTokenCount responseTokenCount serviceTier trafficType"),
        **dict.fromkeys(("promptTokensDetails", "candidatesTokensDetails", "cacheTokensDetails"), _TOKENS),
        **dict.fromkeys(("toolUsePromptTokensDetails", "responseTokensDetails"), _TOKENS),
    },
}
COUNT_TOKENS: Fields = {
    **_values("totalTokens cachedContentTokenCount"),
    "promptTokensDetails": _TOKENS,
    "cacheTokensDetails": _TOKENS,
}
MODEL: Fields = _values(
    "name baseModelId version displayName description inputTokenLimit outputTokenLimit supportedGenerationMethods "
    "temperature maxTemperature topP topK thinking"
)
LIST_MODELS: Fields = {"models": MODEL, "nextPageToken": VALUE}
FILE: Fields = {
    **_values("name displayName mimeType sizeBytes createTime updateTime expirationTime sha256Hash uri downloadUri"),
    **_values("state source"),
    "videoMetadata": _values("videoDuration"),
    "error": {**_values("code message"), "details": ANYTHING},
}
LIST_FILES: Fields = {"files": FILE, "nextPageToken": VALUE}
CREATE_FILE: Fields = {"file": FILE}
EMPTY: Fields = {}

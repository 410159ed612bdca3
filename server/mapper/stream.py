"""Engine events to GenerateContentResponse: whole, or in chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

from engine.api.events import CandidateFinished, Delta, Event, FinishReason, RequestFinished
from server.errors import as_api_error
from server.mapper.candidates import PLAIN, CandidateBuilder, Reading
from server.mapper.logprobs import TokenText
from server.mapper.usage import usage_metadata


class Answer:
    """One response in the making. ``model_version`` is the resolved name of the model, never an alias;
    ``document_tokens`` are among the ``prompt_tokens``."""

    def __init__(
        self,
        response_id: str,
        model_version: str,
        prompt_tokens: int,
        candidates: int,
        token_text: TokenText,
        reading: Reading = PLAIN,
        document_tokens: int = 0,
    ) -> None:
        created = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        self._head = {"modelVersion": model_version, "createTime": created, "responseId": response_id}
        self._prompt_tokens = prompt_tokens
        self._document_tokens = document_tokens
        self._cached_tokens: int | None = None
        self._candidates = [CandidateBuilder(index, token_text, reading) for index in range(candidates)]

    async def whole(self, events: AsyncGenerator[Event, None]) -> dict[str, Any]:
        """The response, when the answer is complete. Raises ``ApiError`` where the request failed."""
        async with aclosing(events):
            async for event in events:
                await self._take(event)
        return self._response(self._candidates)

    async def chunks(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[dict[str, Any], None]:
        """Responses that each hold what is new. Raises ``ApiError`` where the request fails.

        The last candidate's end waits for the end of the request, so that the last chunk has the final usage.
        """
        async with aclosing(events):
            async for event in events:
                await self._take(event)
                if changed := self._changed(event):
                    yield self._response(changed)

    async def _take(self, event: Event) -> None:
        match event:
            case Delta(candidate=index):
                self._candidates[index].add(event)
            case CandidateFinished(candidate=index, reason=reason) if reason is not FinishReason.ABORTED:
                self._candidates[index].finish(event)
                await self._candidates[index].settle()
            case RequestFinished(error=error, cached_tokens=cached):
                if error is not None:
                    raise as_api_error(error)
                self._cached_tokens = cached

    def _changed(self, event: Event) -> list[CandidateBuilder]:
        """The candidates that have a chunk because of this event."""
        match event:
            case Delta(candidate=index):
                grown = self._candidates[index]
                return [grown] if grown.has_pending_parts else []
            case CandidateFinished(candidate=index):
                others_open = any(candidate.finished is None for candidate in self._candidates)
                ended = self._candidates[index]
                return [ended] if others_open and ended.finished else []
            case _:
                return [candidate for candidate in self._candidates if not candidate.is_closed]

    def _response(self, candidates: list[CandidateBuilder]) -> dict[str, Any]:
        chunks = [candidate.last_chunk() if candidate.finished else candidate.chunk() for candidate in candidates]
        generated = sum(candidate.tokens for candidate in self._candidates)
        thoughts = sum(candidate.thoughts for candidate in self._candidates)
        usage = usage_metadata(self._prompt_tokens, generated, thoughts, self._cached_tokens, self._document_tokens)
        return {"candidates": chunks, "usageMetadata": usage, **self._head}

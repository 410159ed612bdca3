"""One candidate as it grows: what is new since the last chunk, and how it ended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.api.events import CandidateFinished, Delta, FinishReason
from server.families.tool_call_reader import ToolCall
from server.mapper.logprobs import ScoredToken, TokenText, logprobs_result
from server.mapper.parts import PartsParser, Piece, Text, Thought
from server.mapper.thought_signature import Signer

_REASONS = {
    FinishReason.STOP: "STOP",
    FinishReason.MAX_TOKENS: "MAX_TOKENS",
    FinishReason.MALFORMED: "MALFORMED_RESPONSE",
}


@dataclass(frozen=True, slots=True)
class Reading:
    """How the candidates of a request are read: ``new_parser`` is None where an answer is nothing but text.

    Thoughts are shown only with ``include_thoughts``; ``signer`` seals them for the caller to carry. ``check`` gets the
    text and the calls of a candidate that came to its end, and says what is wrong with them, "" if nothing is.
    """

    new_parser: Callable[[], PartsParser] | None = None
    include_thoughts: bool = False
    signer: Signer | None = None
    check: Callable[[str, Sequence[ToolCall]], Awaitable[str]] | None = None


PLAIN = Reading()


class CandidateBuilder:
    """Makes the chunks of one candidate from what the engine adds to it.

    ``tokens`` counts the tokens of its answer so far, ``thoughts`` those before it. ``finished`` is the engine's last
    event of it, None until then, and ``is_closed`` says that its last chunk was made.
    """

    def __init__(self, index: int, token_text: TokenText, reading: Reading = PLAIN) -> None:
        self.tokens = 0
        self.thoughts = 0
        self.finished: CandidateFinished | None = None
        self.is_closed = False
        self._index = index
        self._token_text = token_text
        self._check = reading.check
        self._said: list[str] = []
        self._calls: list[ToolCall] = []
        self._remark = ""
        self._parser = reading.new_parser() if reading.new_parser else None
        self._parts = _Parts(reading)
        self._scored_tokens: list[ScoredToken] = []
        self._logprob_sum = 0.0
        self._scored = 0

    def add(self, delta: Delta) -> None:
        """What the engine added. Log-probabilities, of the answer alone, wait here until there is a part."""
        if delta.text:
            self._add_all(self._parser.feed(delta.text) if self._parser else [Text(delta.text)])
        if delta.thought:
            self.thoughts += len(delta.token_ids)
            return
        self.tokens += len(delta.token_ids)
        if delta.logprobs:
            self._scored += len(delta.logprobs)
            self._scored_tokens += map(ScoredToken, delta.token_ids, delta.logprobs)
            self._logprob_sum += sum(logprobs.chosen for logprobs in delta.logprobs)

    def finish(self, event: CandidateFinished) -> None:
        """The engine is done with this candidate."""
        self.finished = event
        self.thoughts, self.tokens = event.thoughts, event.tokens - event.thoughts
        self._add_all(self._parser.flush(event.reason) if self._parser else [])
        self._parts.end_thoughts()

    async def settle(self) -> None:
        """Check the answer, if it came to its end."""
        assert self.finished is not None
        if self._check is not None and self.finished.reason is FinishReason.STOP:
            self._remark = await self._check("".join(self._said), self._calls)

    @property
    def has_pending_parts(self) -> bool:
        """Whether there is a part for a chunk. Calls wait for the end of the answer, which follows them.

        Clients with automatic function calling (google-genai 1.60) look for calls in a stream's last chunk only.
        """
        return bool(self._parts) and not self._parts.has_call

    def chunk(self) -> dict[str, Any]:
        """What is new since the last chunk. Its content always has a part and a role."""
        parts = self._parts.take() or [{"text": ""}]
        chunk: dict[str, Any] = {"content": {"parts": parts, "role": "model"}, "index": self._index}
        if self._scored_tokens:
            chunk["logprobsResult"] = logprobs_result(self._scored_tokens, self._token_text)
        self._scored_tokens = []
        return chunk

    def last_chunk(self) -> dict[str, Any]:
        """The last one, with the finish reason and the totals."""
        assert self.finished is not None
        self.is_closed = True
        chunk = self.chunk()
        problem = self._parser.problem if self._parser else ""
        message = problem or self.finished.message or self._remark
        chunk["finishReason"] = "MALFORMED_FUNCTION_CALL" if problem else _REASONS[self.finished.reason]
        if message:
            chunk["finishMessage"] = message
        chunk["tokenCount"] = self.tokens
        if self._scored:
            chunk["avgLogprobs"] = self._logprob_sum / self._scored
        return chunk

    def _add_all(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self._parts.add(piece)
            if self._check is not None and isinstance(piece, Text):
                self._said.append(piece.text)
            elif self._check is not None and isinstance(piece, ToolCall):
                self._calls.append(piece)


class _Parts:
    """Pieces as the parts of a content, neighbours of a kind joined.

    Where thoughts end, their last part carries their signature, and so does every call after them.
    """

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._parts: list[dict[str, Any]] = []
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._thinking = False
        self._signature: dict[str, str] = {}
        self.has_call = False

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, piece: Piece) -> None:
        """The next piece; thoughts that are not to be shown are only remembered."""
        if isinstance(piece, Thought):
            if not self._thinking:
                self._thinking, self._thoughts = True, []
            self._thoughts.append(piece.text)
            if self._reading.include_thoughts:
                self._write(piece.text, thought=True)
            return
        self.end_thoughts()
        if isinstance(piece, Text):
            self._write(piece.text)
        else:
            self._join()
            self.has_call = True
            call = {"id": piece.id, "name": piece.name, "args": piece.args}
            self._parts.append({"functionCall": call, **self._signature})

    def end_thoughts(self) -> None:
        """The thoughts are over; what comes next, if anything, is part of the answer."""
        signer = self._reading.signer
        if not self._thinking or signer is None:
            return
        self._thinking = False
        sealed = signer.seal("".join(self._thoughts))
        self._signature = {"thoughtSignature": sealed} if sealed else {}
        if sealed and self._reading.include_thoughts:
            self._write("", thought=True)
            self._parts[-1] |= self._signature

    def take(self) -> list[dict[str, Any]]:
        """The parts that are new since the last call."""
        self._join()
        taken, self._parts = self._parts, []
        return taken

    def _write(self, text: str, **marks: bool) -> None:
        """Add to the last part if it is of the same kind and not sealed."""
        kind = {"text": "", **marks}
        if not self._parts or self._parts[-1] != kind:
            self._join()
            self._parts.append(kind)
        self._texts.append(text)

    def _join(self) -> None:
        if self._texts:
            self._parts[-1] |= {"text": "".join(self._texts)}
            self._texts = []

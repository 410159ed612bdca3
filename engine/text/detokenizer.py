"""Token ids to text, one at a time, without ever splitting a character."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders

# A character has at most four bytes, so a longer wait is for one that will never be complete.
MAX_PENDING = 32


def hidden_ids(tokenizer: Tokenizer, markers: frozenset[int] = frozenset()) -> frozenset[int]:
    """The special tokens that leave no text: all but ``markers``, whose content the readers of the text need."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special) - markers


class TokenTexts:
    """What the tokens of one tokenizer read as; all its detokenizers share what is remembered.

    ``concatenates`` says that the text of tokens is that of their bytes end to end, whatever comes before: then whole
    characters never change by what follows.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.concatenates = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._tokenizer = tokenizer
        self._single: dict[int, str] = {}

    def read(self, token_ids: Sequence[int]) -> str:
        """The tokens as a text of their own."""
        if len(token_ids) > 1:
            return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))
        # Most pieces are one token, and a look into a table costs a tenth of decoding it.
        text = self._single.get(token_ids[0])
        if text is None:
            text = self._single[token_ids[0]] = str(self._tokenizer.decode(token_ids, skip_special_tokens=False))
        return text


class Detokenizer:
    """Turns one candidate's tokens into text.

    All that ``feed`` and ``flush`` return, joined, equals ``tokenizer.decode`` of the same ids without the hidden ones,
    so an answer reads the same streamed and whole. The prompt is not part of the text: what a tokenizer does at the
    start of a text (dropping a space) it does to the answer, and a prompt that ends inside a character cannot leak into
    it.

    Each token is decoded behind the tokens of the piece before it, because decoders treat the first token of a text
    differently, unless the tokenizer ``concatenates``. ``tokenizers.decoders.DecodeStream`` has no flush, holds back
    without limit, and reports bytes that are not text by a bare ``Exception``.
    """

    def __init__(self, texts: TokenTexts, hidden: frozenset[int]) -> None:
        self._texts = texts
        self._hidden = hidden
        self._shown: list[int] = []
        self._pending: list[int] = []

    def feed(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        if token_id in self._hidden:
            return ""
        self._pending.append(token_id)
        text = self._pending_text()
        if (not text or text.endswith("\ufffd")) and len(self._pending) <= MAX_PENDING:
            return ""
        return self._show(text)

    def flush(self) -> str:
        """What is left at the end; an incomplete character reads as U+FFFD."""
        return self._show(self._pending_text()) if self._pending else ""

    def _pending_text(self) -> str:
        if self._texts.concatenates or not self._shown:
            return self._texts.read(self._pending)
        shown, together = self._texts.read(self._shown), self._texts.read(self._shown + self._pending)
        if together.startswith(shown):
            return together[len(shown) :]
        # Bytes that are not text changed how the piece before them decodes; what was shown stays.
        return self._texts.read(self._pending)

    def _show(self, text: str) -> str:
        self._shown, self._pending = self._pending, []
        return text

"""Grammars that answers must follow, by llguidance: one matcher for each candidate tells which tokens may come next."""

from __future__ import annotations

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from engine import masks
from engine.masks import Mask
from engine.types import RequestRefused

# What a single mask may cost stays at llguidance's defaults, a few milliseconds; its messages must not repeat a
# grammar or an answer.
_LIMITS = LLParserLimits(verbose_errors=False)


class GrammarMatcher:
    """``engine.batch.Matcher`` over an llguidance matcher. Not for two threads at once.

    ``eos_ids`` are the tokens that llguidance allows where the answer may end. They are no part of the mask: which
    tokens end an answer is the request's to say.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids

    @property
    def accepting(self) -> bool:
        return self._matcher.is_accepting()

    @property
    def stopped(self) -> bool:
        return self._matcher.is_stopped()

    @property
    def error(self) -> str:
        return self._matcher.get_error().removesuffix("<non-verbose/>").strip()

    def mask(self) -> Mask:
        return masks.without(self._matcher.compute_bitmask()[: (self._vocab_size + 7) // 8], self._eos_ids)

    def allows(self, token_id: int) -> bool:
        return self._matcher.validate_tokens([token_id]) == 1

    def consume(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)

    def restart(self) -> None:
        self._matcher.reset()

    def copy(self) -> GrammarMatcher:
        return GrammarMatcher(self._matcher.deep_copy(), self._vocab_size, self._eos_ids)


class GrammarBuilder:
    """``engine.batch.Grammars`` for one model.

    Making it takes 0.7 s for 49,000 tokens and 5 s for 262,000, and no other thread runs meanwhile. Raises ValueError
    where the tokenizer's tokens cannot be read as bytes, or where no token is known to end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        rows = max(vocab_size, tokenizer.get_vocab_size())
        self._tokenizer = LLTokenizer(tokenizer.to_str(), n_vocab=rows, eos_token=list(eos_ids))

    def build(self, grammar: str) -> GrammarMatcher:
        """A matcher at the grammar's beginning. Raises ``RequestRefused``; cannot be interrupted."""
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise RequestRefused(f"grammar cannot be compiled: {matcher.get_error().strip()}")
        return GrammarMatcher(matcher, self._vocab_size, self._eos_ids)

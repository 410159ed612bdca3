"""Grammars that answers must follow, by llguidance: the matcher of a candidate computes which tokens may come next."""

from __future__ import annotations

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer

from engine.api.errors import RequestRefused
from engine.constraints import masks
from engine.constraints.masks import Mask
from engine.constraints.vocabulary import Vocabulary

# The cost of a single mask is limited by llguidance's defaults, a few milliseconds. Its messages must not repeat a
# grammar or an answer.
_LIMITS = LLParserLimits(verbose_errors=False)
_NO_TOKEN = "NoExtensionBias"  # how llguidance says that no token continues a text: no limit was exceeded


class GrammarMatcher:
    """``engine.constraints.contracts.Matcher`` over an llguidance matcher. Not for two threads at once.

    ``eos_ids`` are the tokens that llguidance allows where the answer may end. They are not part of the mask: the
    request names the tokens that end its answer.
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
        error = _error(self._matcher)
        return "" if error == _NO_TOKEN else error

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
    """``engine.constraints.contracts.Grammars`` for one model.

    Making it takes 0.4 s for 49,000 tokens and 2 s for 262,000, and blocks all other threads meanwhile. Raises
    ValueError if the tokenizer's tokens cannot be read as bytes, or if no token is known to end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        vocabulary = Vocabulary(tokenizer, vocab_size, eos_ids)
        self._tokenizer = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=list(eos_ids))
        vocabulary.in_longest_tokens = self._tokenizer.greedy_tokenize

    def build(self, grammar: str) -> GrammarMatcher:
        """A matcher at the grammar's beginning. Raises ``RequestRefused``; cannot be interrupted."""
        compiled = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if compiled.is_error():
            raise RequestRefused(f"grammar cannot be compiled: {_error(compiled)}")
        matcher = GrammarMatcher(compiled, self._vocab_size, self._eos_ids)
        if not matcher.accepting and (masks.is_empty(matcher.mask()) or matcher.stopped):
            problem = matcher.error or "no token of this model begins such a text; ask for another one"
            raise RequestRefused(f"grammar cannot be followed: {problem}.")
        return matcher


def _error(matcher: LLMatcher) -> str:
    """The message of llguidance, without the trace that it appends when its own code fails."""
    return matcher.get_error().partition("<backtrace>")[0].removesuffix("<non-verbose/>").strip()

"""Grammars that answers must follow, by llguidance: the matcher of a candidate computes which tokens may come next."""

from __future__ import annotations

import json
from secrets import token_hex
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from engine.api.errors import RequestRefused
from engine.constraints import masks
from engine.constraints.masks import Mask

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

    Making it takes 0.7 s for 49,000 tokens and 5 s for 262,000, and blocks all other threads meanwhile. Raises
    ValueError if the tokenizer's tokens cannot be read as bytes, or if no token is known to end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        rows = max(vocab_size, tokenizer.get_vocab_size())
        described = json.loads(tokenizer.to_str())
        controls = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        _rename_control_tokens(described, {token: tokenizer.id_to_token(token) for token in controls.union(eos_ids)})
        self._tokenizer = LLTokenizer(json.dumps(described), n_vocab=rows, eos_token=list(eos_ids))

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


def _rename_control_tokens(described: dict[str, Any], controls: dict[int, str | None]) -> None:
    """Give control tokens names that no text can contain, in the content of a ``tokenizer.json``.

    Where only one text can follow, llguidance tokenizes it, and would make a control token of text that is the token's
    name. The renamed tokens keep their ids, by which a grammar may still name them.
    """
    known = {name: token_id for token_id, name in controls.items() if name is not None}
    secret = token_hex(16)
    names = {name: f"control_{secret}_{token_id}" for name, token_id in known.items()}
    model = described["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if names.keys().isdisjoint([*pair, "".join(pair)])]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": known[name], "content": names[name], **flags, "special": True} for name in names]
    others = [token for token in described["added_tokens"] if token["content"] not in names]
    described["added_tokens"] = sorted([*others, *added], key=lambda token: int(token["id"]))

"""What a grammar lets pass, byte by byte."""

from __future__ import annotations

from llguidance import LLMatcher

from server.grammar.llguidance import byte_tokenizer


def accepts(grammar: str, text: str) -> bool:
    """Whether ``text`` is a whole answer by ``grammar``."""
    matcher = LLMatcher(byte_tokenizer(), grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    raw = list(text.encode())
    return matcher.try_consume_tokens(raw) == len(raw) and matcher.is_accepting()

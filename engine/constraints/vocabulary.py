"""The tokens of a tokenizer as bytes, and texts as tokens, without a second tokenizer in the process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from secrets import token_hex
from typing import Any

from tokenizers import Tokenizer

# Begins a text for tokenizers that put a space before the first word; no token has it inside.
_MARK = "\x02"
_BYTE = re.compile("<0x([0-9A-F]{2})>")


class Vocabulary:
    """What llguidance asks of a tokenizer.

    Where only one text can follow, llguidance has it tokenized. No text becomes a control token then, which are those
    that are special and those of ``eos_ids``: they have names that no text can contain, and keep their ids, by which a
    grammar may still name them.
    """

    bos_token_id: int | None = None
    in_longest_tokens: Callable[[str], list[int]]
    """Reads a text as tokens of its own, the longest first: texts that the tokenizer would not read as such."""

    def __init__(self, tokenizer: Tokenizer, rows: int, eos_ids: tuple[int, ...]) -> None:
        if not eos_ids:
            raise ValueError("no token is known to end an answer")
        self.eos_token_id = eos_ids[0]
        special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._tokenizer = tokenizer
        self._controls = special.union(eos_ids)
        self.special_token_ids = sorted(each for each in self._controls if tokenizer.id_to_token(each) is not None)
        self.tokens = token_bytes(tokenizer, rows)
        secret = token_hex(16)
        for token_id in self.special_token_ids:
            self.tokens[token_id] = f"control_{secret}_{token_id}".encode()
        self._mark = "" if self._bytes(self._encoded("a")) == b"a" else _MARK
        self._mark_ids = self._encoded(self._mark)

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text, as the tokenizer reads it inside a longer one."""
        found = self._encoded(self._mark + text)
        ids = found[len(self._mark_ids) :]
        is_same = found[: len(self._mark_ids)] == self._mark_ids and self._bytes(ids) == text.encode()
        return ids if is_same and self._controls.isdisjoint(ids) else self.in_longest_tokens(text)

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _bytes(self, ids: list[int]) -> bytes:
        return b"".join(self.tokens[token_id] for token_id in ids)


def token_bytes(tokenizer: Tokenizer, rows: int) -> list[bytes]:
    """The bytes that each of ``rows`` tokens, or more, stands for inside a text; none for ids without a token.

    Raises ValueError for a tokenizer whose tokens stand for their bytes in no known way: neither GPT-2's alphabet
    (``ByteLevel``), nor text with bytes as ``<0x0A>`` (``ByteFallback``, as SentencePiece has it).
    """
    described: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
    steps = {step["type"]: step for step in described.get("decoders", [described] if described else [])}
    added = tokenizer.get_added_tokens_decoder()
    rows = max(rows, tokenizer.get_vocab_size(), *(token_id + 1 for token_id in added))
    names = [tokenizer.id_to_token(token_id) or "" for token_id in range(rows)]
    if "ByteFallback" in steps:
        space = steps.get("Replace", {}).get("pattern", {}).get("String", " ")
        found = [_of_pieces(name, space) for name in names]
    elif "ByteLevel" in steps:
        found = [_of_alphabet(name) for name in names]
    else:
        raise ValueError(f"the bytes of its tokens are not known (decoder: {', '.join(steps) or 'none'})")
    for token_id, token in added.items():
        found[token_id] = token.content.encode()
    return found


def _of_pieces(name: str, space: str) -> bytes:
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace(space, " ").encode()


def _alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: those that are printable stand for themselves (``bytes_to_unicode``)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_ALPHABET = _alphabet()


def _of_alphabet(name: str) -> bytes:
    """A token with a character outside the alphabet was never made of bytes: it stands for itself."""
    try:
        return bytes([_ALPHABET[character] for character in name])
    except KeyError:
        return name.encode()

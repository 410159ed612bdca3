"""JSON as Google's parser takes it, beyond RFC 8259: names and texts in single quotes, names without quotes, trailing
commas, line breaks within texts (protobuf's JsonStreamParser; Google's own curl samples need the first two).

JSON5 holds all of that but the line breaks. Comments, which it has too, are no part of what Google takes.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pyjson5

MAX_DEPTH = 400
"""How deep containers may be nested."""
# Possessive, and with an end that may be missing: every byte is looked at once, whatever is sent.
_TEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|\'(?:[^\'\\]++|\\.)*+\'?', re.DOTALL)
_BREAK = re.compile(rb"(\\.)|([\r\n])", re.DOTALL)
_ESCAPED = {b"\r": rb"\r", b"\n": rb"\n"}


def read_relaxed(raw: bytes, max_containers: int, max_values: int) -> Any:
    """The value that ``raw``, in UTF-8, spells. Raises ``ValueError`` where it is none, holds more containers or values
    than allowed, numbers that are not finite, or text that is not Unicode."""
    structure = _TEXT.sub(b"", raw)
    if b"/" in structure:
        raise ValueError("It holds a comment.")
    if structure.count(b"{") + structure.count(b"[") > max_containers or structure.count(b",") >= max_values:
        raise ValueError(f"It holds more than {max_values} values or {max_containers} objects and lists.")
    try:
        value = pyjson5.decode(_TEXT.sub(_on_one_line, raw).decode(), MAX_DEPTH)
    except pyjson5.Json5DecoderException as error:
        raise ValueError(str(error.args[0])) from None
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


def _on_one_line(text: re.Match[bytes]) -> bytes:
    found = text[0]
    if b"\n" not in found and b"\r" not in found:
        return found
    return _BREAK.sub(lambda at: at[1] or _ESCAPED[at[2]], found)

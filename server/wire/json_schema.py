"""Facts of JSON Schema that messages and grammars share."""

from __future__ import annotations

TYPES = ("string", "number", "integer", "boolean", "array", "object", "null")
"""In the order of the numbers, from 1 on, that older clients send."""


MAX_NESTING = 100

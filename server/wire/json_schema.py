"""Facts of JSON Schema that messages, prompts and grammars share: its keywords, and how large a schema may be."""

from __future__ import annotations

from typing import Any

from server.errors import InvalidArgument

TYPES = ("string", "number", "integer", "boolean", "array", "object", "null")
"""In the order of the numbers that older clients send, from 1 on."""

SCHEMAS = ("additionalProperties", "additionalItems", "items")
LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
MAPS_OF_SCHEMAS = ("properties", "patternProperties")
VALUE_KEYWORDS = frozenset(
    [
        *("type", "enum", "const", "format", "pattern", "required", "propertyOrdering", "nullable"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
    ]
)
"""Keywords whose values hold no schemas."""

MAX_VALUES = 20_000
MAX_CHARACTERS = 200_000
MAX_NESTING = 100


def check_size(schema: Any, field: str, times: int = 1) -> None:
    """Raises ``InvalidArgument`` for a schema with more values, characters (those of numbers included) or levels than
    are read. A list of several schemas may be ``times`` as large."""
    values = characters = 0
    most_values, most_characters = MAX_VALUES * times, MAX_CHARACTERS * times
    left: list[tuple[Any, int]] = [(schema, 1)]
    while left:
        value, level = left.pop()
        values += 1
        if isinstance(value, dict):
            characters += sum(map(len, value))
        elif isinstance(value, str):
            characters += len(value)
        elif isinstance(value, int):
            characters += value.bit_length() // 3
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        too_many = values + len(left) + len(inner) > most_values
        if level > MAX_NESTING or too_many or characters > most_characters:
            raise InvalidArgument.at(
                field,
                f"{field}: the schema is too large: at most {most_values} values, {most_characters} characters "
                f"and {MAX_NESTING} levels are read. Send a smaller schema.",
            )
        left += [(item, level + 1) for item in inner]

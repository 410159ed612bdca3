"""Places in a message, in both spellings of its fields."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class Path(NamedTuple):
    """A place in a message, in both spellings of its fields."""

    json: str = ""
    snake: str = ""

    def to(self, name: str) -> Path:
        """The field ``name`` (snake_case) of the message at this path."""
        json, snake = camel(name), name
        return Path(f"{self.json}.{json}", f"{self.snake}.{snake}") if self.json else Path(json, snake)

    def at(self, index: int) -> Path:
        """The element of the list at this path."""
        return Path(f"{self.json}[{index}]", f"{self.snake}[{index}]")


ROOT = Path()


@lru_cache(maxsize=1024)
def camel(name: str) -> str:
    """proto3's JSON name of a field."""
    head, *rest = name.split("_")
    return head + "".join(word.capitalize() for word in rest)
